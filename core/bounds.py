"""The bound of every field of a request, and the checks that name it. Standard library only; knows no request."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from core.errors import InvalidField, UnknownField

Wire: TypeAlias = dict[str, Any]  #: a JSON object

MAX_PROMPT_CHARACTERS = 1_000_000
MAX_PROMPT_TOKENS = 262_144
MAX_TOKEN_ID = 2**31 - 1
MAX_MESSAGES = 1_024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 300
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 256
MAX_MODEL_CHARACTERS = 256
MAX_SALT_CHARACTERS = 256
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Bound:
    """The closed range of a number, or the open end where ``above`` is set."""

    low: float
    high: float
    whole: bool = False
    above: bool = False  #: ``low`` itself is excluded

    def check(self, param: str, value: object) -> None:
        """Raise ``InvalidField`` unless ``value`` is a finite number inside."""
        if isinstance(value, bool) or not isinstance(value, int | (int if self.whole else float)):
            raise InvalidField(param, f"must be {'an integer' if self.whole else 'a number'}, not {value!r:.40}")
        if not math.isfinite(value) or value > self.high or value < self.low or (self.above and value == self.low):
            raise InvalidField(param, f"must be {self}, not {value!r:.40}")

    def __str__(self) -> str:
        low, high = (int(self.low), int(self.high)) if self.whole else (self.low, self.high)
        return f"above {low} and at most {high}" if self.above else f"from {low} to {high}"


#: The one place where the bounds of sampling parameters stand; the HTTP schema reads them from here.
BOUNDS: Mapping[str, Bound] = {
    "max_tokens": Bound(1, 131_072, whole=True),
    "n": Bound(1, 64, whole=True),
    "temperature": Bound(0.0, 2.0),
    "top_p": Bound(0.0, 1.0, above=True),
    "top_k": Bound(0, 1_000_000, whole=True),
    "min_p": Bound(0.0, 1.0),
    "seed": Bound(0, 2**63 - 1, whole=True),
    "logprobs": Bound(0, 20, whole=True),
    "prompt_logprobs": Bound(0, 20, whole=True),
    "presence_penalty": Bound(-2.0, 2.0),
    "frequency_penalty": Bound(-2.0, 2.0),
    "repetition_penalty": Bound(0.0, 2.0, above=True),
    "min_tokens": Bound(0, 131_072, whole=True),
}
LOGIT_BIAS = Bound(-100.0, 100.0)  #: of each token
PRIORITY = Bound(-100, 100, whole=True)  #: of a request; the lower, the earlier


def refuse_unknown(fields: Mapping[str, object], known: Collection[str], *, prefix: str = "") -> None:
    """Raise ``UnknownField``, with the nearest known name as its suggestion, for the first name not in ``known``."""
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UnknownField(f"{prefix}{name}", near[0] if near else None)


def table(param: str, wire: object) -> Wire:
    """Raise ``InvalidField`` unless ``wire`` is a JSON object."""
    if not isinstance(wire, dict) or not all(isinstance(key, str) for key in wire):
        raise InvalidField(param or "body", "must be a JSON object")
    return wire


def check_prompt(prompt: object) -> None:
    """Raise ``InvalidField`` unless it is a text of the allowed length."""
    if not isinstance(prompt, str) or not 0 < len(prompt) <= MAX_PROMPT_CHARACTERS:
        raise InvalidField("input.prompt", f"must be a string of 1 to {MAX_PROMPT_CHARACTERS} characters")


def check_messages(contents: Collection[str]) -> None:
    """Raise ``InvalidField`` unless it is a chat of the allowed length."""
    if not 0 < len(contents) <= MAX_MESSAGES:
        raise InvalidField("input.messages", f"must hold 1 to {MAX_MESSAGES} messages")
    if sum(map(len, contents)) > MAX_PROMPT_CHARACTERS:
        raise InvalidField("input.messages", f"must hold at most {MAX_PROMPT_CHARACTERS} characters together")


def check_token_ids(param: str, token_ids: tuple[object, ...], most: int = MAX_PROMPT_TOKENS) -> None:
    """Raise ``InvalidField`` unless it is a list of token ids."""
    if not 0 < len(token_ids) <= most:
        raise InvalidField(param, f"must hold 1 to {most} token ids")
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise InvalidField(param, f"must hold token ids from 0 to {MAX_TOKEN_ID}")


def check_texts(param: str, texts: tuple[object, ...], most: int, characters: int) -> None:
    """Raise ``InvalidField`` unless it is so many strings of such a length at most."""
    if len(texts) > most:
        raise InvalidField(param, f"must hold at most {most} strings")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= characters:
            raise InvalidField(param, f"must hold strings of 1 to {characters} characters")


def check_logit_bias(pairs: tuple[tuple[object, object], ...]) -> None:
    """Raise ``InvalidField`` unless it is token ids, each with what is added to its logit."""
    if len(pairs) > MAX_LOGIT_BIASES:
        raise InvalidField("params.logit_bias", f"must hold at most {MAX_LOGIT_BIASES} token ids")
    for token_id, bias in pairs:
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise InvalidField("params.logit_bias", f"must hold token ids from 0 to {MAX_TOKEN_ID}")
        LOGIT_BIAS.check(f"params.logit_bias.{token_id}", bias)
