"""What a verb is: its flags, its example, what it runs. Knows argparse; knows no particular verb."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.client import Client
from headrace.layers import flag
from headrace.patience import Patience
from headrace.settings import RULES, SettingError, Settings

#: Stable exit codes.
OK, FAILED, USAGE, UNREACHABLE, TIMED_OUT = 0, 1, 2, 3, 5

CLIENT_SETTINGS = ("url", "api_key", "api_key_file")
SAMPLING: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "generate at most this many tokens"),
    "n": (int, "so many answers, each drawn by its own randomness"),
    "temperature": (float, "0 takes the likeliest token"),
    "top_p": (float, "keep the likeliest tokens whose probabilities reach this sum"),
    "top_k": (int, "keep this many likeliest tokens"),
    "min_p": (float, "drop tokens less likely than this times the likeliest"),
    "seed": (int, "same seed, same answer"),
    "presence_penalty": (float, "off the logit of each token that the answer holds"),
    "frequency_penalty": (float, "off the logit of a token for each time that the answer holds it"),
    "repetition_penalty": (float, "above 1: what prompt or answer holds becomes less likely"),
    "logit_bias": (json.loads, "token ids and what is added to their logits, as JSON"),
    "structured_outputs": (json.loads, 'the form of the answer, as JSON: {"regex": "…"}, {"json": {…}} …'),
    "min_tokens": (int, "nothing ends the answer before it has so many"),
    "logprobs": (int, "log-probabilities of this many likeliest tokens"),
    "prompt_logprobs": (int, "the same of the prompt's tokens"),
}
REPEATED: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "stop": (str, "end before this text"),
    "stop_token_ids": (int, "end with this token"),
    "bad_words": (str, "never say this"),
}
_METAVARS: Mapping[Any, str] = {int: "INT", float: "FLOAT"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """One use of a verb: what was typed, and the world it was typed in."""

    arguments: argparse.Namespace
    settings: Settings
    environ: Mapping[str, str]

    @property
    def json(self) -> bool:
        """Print for a program."""
        return bool(self.arguments.json)

    def print(self, value: Any, text: str) -> None:
        """One answer: JSON on one line for a program, text for a person."""
        print(json.dumps(value, ensure_ascii=False) if self.json else text, flush=True)

    def note(self, text: str) -> None:
        """For a person only, and out of the way of what is piped on."""
        if not self.json:
            print(text, file=sys.stderr, flush=True)

    def client(self, patience: Patience | None = None) -> Client:
        """A client of the server that the settings name."""
        return Client(self.settings.url, api_key=self.settings.read_api_key(), patience=patience)

    def ids(self) -> Sequence[str]:
        """The ids that were typed, or for ``-`` those on standard input.

        Raises:
            SettingError: there is none.
        """
        given: Sequence[str] = self.arguments.ids
        ids = sys.stdin.read().split() if list(given) == ["-"] else given
        if not ids:
            raise SettingError("no job id was given")
        return ids

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that were given."""
        given = {name: getattr(self.arguments, name) for name in (*SAMPLING, *REPEATED)}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """A subcommand."""

    name: str
    text: str  #: one line
    example: str
    settings: tuple[str, ...]  #: that it takes as flags
    run: Callable[[Invocation], int]  #: returns the exit code
    add: Callable[[argparse.ArgumentParser], None] = lambda _: None  #: arguments of its own

    def build(self, parser: argparse.ArgumentParser) -> None:
        """Put its arguments into its parser; texts of settings are parsed by the layers, which know the bounds."""
        self.add(parser)
        for name in self.settings:
            rule = RULES[name]
            metavar = "|".join(rule.choices) or name.rpartition("_")[2].upper()
            parser.add_argument(flag(name), dest=f"setting_{name}", metavar=metavar, help=rule.text)
        parser.add_argument("--config", metavar="FILE", help="settings file (default: ./headrace.toml where it is)")
        parser.add_argument("--json", action="store_true", help="print JSON, one object a line")

    def flags_given(self, arguments: argparse.Namespace) -> dict[str, str]:
        """Setting name to the text that was typed."""
        typed = {name: getattr(arguments, f"setting_{name}") for name in self.settings}
        return {name: text for name, text in typed.items() if text is not None}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Flags for how tokens are drawn; the server knows the bounds."""
    for name, (kind, text) in SAMPLING.items():
        parser.add_argument(flag(name), type=kind, metavar=_METAVARS.get(kind, "JSON"), help=text)
    for name, (kind, text) in REPEATED.items():
        word = "ID" if kind is int else "TEXT"
        parser.add_argument(flag(name), action="append", type=kind, metavar=word, help=f"{text}; may be repeated")
