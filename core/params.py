"""How tokens are drawn and when an answer ends, with every bound. Standard library only; knows no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core import bounds
from core.bounds import BOUNDS, Wire, refuse_unknown, table
from core.errors import InvalidField
from core.structured import Structured


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn, and when to stop.

    Raises:
        InvalidField: a value is out of its bound; ``param`` is ``params.<name>``.
    """

    max_tokens: int = 64  #: generate at most this many
    n: int = 1  #: choices: answers to one prompt, each drawn by its own randomness
    temperature: float = 0.0  #: 0 takes the likeliest token
    top_p: float = 1.0  #: keep the likeliest tokens whose probabilities reach this sum
    top_k: int = 0  #: keep this many likeliest tokens; 0 keeps all
    min_p: float = 0.0  #: drop tokens less likely than this times the likeliest
    seed: int | None = None  #: None: derived from the job's id, so that a successor draws the same
    stop: tuple[str, ...] = ()  #: end before the first of these
    logprobs: int | None = None  #: log-probabilities of the token and of this many likeliest ones
    prompt_logprobs: int | None = None  #: … of each token of the prompt but the first
    ignore_eos: bool = False  #: go on to max_tokens past the end of the text
    presence_penalty: float = 0.0  #: off the logit of each token that the answer holds
    frequency_penalty: float = 0.0  #: … as often as the answer holds it
    repetition_penalty: float = 1.0  #: divides positive logits of tokens in prompt or answer, multiplies others
    logit_bias: tuple[tuple[int, float], ...] = ()  #: token id, and what is added to its logit
    min_tokens: int = 0  #: nothing ends the answer before it has this many
    stop_token_ids: tuple[int, ...] = ()  #: end with any of these, which is not part of the text
    structured_outputs: Structured | None = None  #: the form the answer must have
    bad_words: tuple[str, ...] = ()  #: texts whose last token is never drawn after the others

    def __post_init__(self) -> None:
        for name, bound in BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in NULLABLE:
                bound.check(f"params.{name}", value)
        bounds.check_texts("params.stop", self.stop, bounds.MAX_STOP_STRINGS, bounds.MAX_STOP_CHARACTERS)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidField("params.ignore_eos", "must be true or false")
        bounds.check_logit_bias(self.logit_bias)
        if self.min_tokens > self.max_tokens:
            raise InvalidField("params.min_tokens", f"must be at most max_tokens, {self.max_tokens}")
        if self.stop_token_ids:
            bounds.check_token_ids("params.stop_token_ids", self.stop_token_ids, bounds.MAX_STOP_TOKEN_IDS)
        bounds.check_texts("params.bad_words", self.bad_words, bounds.MAX_BAD_WORDS, bounds.MAX_BAD_WORD_CHARACTERS)

    @classmethod
    def from_wire(cls, wire: object) -> SamplingParams:
        """Read the ``params`` object of a job.

        Raises:
            UnknownField, InvalidField: naming the field.
        """
        fields = table("params", wire)
        refuse_unknown(fields, [f.name for f in dataclasses.fields(cls)], prefix="params.")
        read = {name: _READ[name](f"params.{name}", value) for name, value in fields.items() if name in _READ}
        return cls(**{**fields, **read})

    def to_wire(self) -> Wire:
        """Only what differs from the defaults: a job's hash stays small."""
        wire = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {name: _WRITE.get(name, _same)(value) for name, value in wire.items()}


NULLABLE = ("seed", "logprobs", "prompt_logprobs")  #: parameters of which null is the default


def _same(value: Any) -> Any:
    return value


def _tuple_of(what: str) -> Callable[[str, object], tuple[Any, ...]]:
    def read(param: str, value: object) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise InvalidField(param, f"must be {what}")
        return tuple(value)

    return read


def _read_stop(param: str, value: object) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else _tuple_of("a string or a list of strings")(param, value)


def _read_logit_bias(param: str, value: object) -> tuple[tuple[int, float], ...]:
    """JSON's keys are strings: ids in decimal, without a sign or a leading zero."""
    found = []
    for key, bias in table(param, value).items():
        if not (key.isascii() and key.isdecimal() and str(int(key[:20])) == key):
            raise InvalidField(param, f"must have token ids as its keys, not {key!r:.40}")
        found.append((int(key), bias))
    return tuple(found)


#: Parameters whose JSON is of another shape than their value, both ways.
_READ: Mapping[str, Callable[[str, object], Any]] = {
    "stop": _read_stop,
    "logit_bias": _read_logit_bias,
    "stop_token_ids": _tuple_of("a list of token ids"),
    "bad_words": _tuple_of("a list of strings"),
    "structured_outputs": lambda _, value: None if value is None else Structured.from_wire(value),
}
_WRITE: Mapping[str, Callable[[Any], Any]] = {
    "stop": list,
    "logit_bias": lambda pairs: {str(token_id): bias for token_id, bias in pairs},
    "stop_token_ids": list,
    "bad_words": list,
    "structured_outputs": Structured.to_wire,
}
