"""The shared words: what is asked (Request), what happens (Event), what is kept (Result).

Standard library only, so that ``api`` and ``jobs`` speak of requests without torch. Everything is frozen, every field
has a bound, and ``Request.from_wire`` raises a ``RequestError`` that names the field and the bound.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from core.errors import InvalidField, UnknownField, UnsupportedRequest

Wire: TypeAlias = dict[str, Any]  #: a JSON object
FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "deadline"]

MAX_PROMPT_CHARACTERS = 1_000_000
MAX_PROMPT_TOKENS = 262_144
MAX_TOKEN_ID = 2**31 - 1
MAX_MESSAGES = 1_024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_MODEL_CHARACTERS = 256
ROLES = ("system", "user", "assistant", "tool")


class Kind(enum.StrEnum):
    """What is to be computed. Values are on the wire and in Redis: add, never rename."""

    GENERATE = "generate"  #: continue a prompt, a chat or token ids
    PREDICT = "predict"  #: the likeliest next token id at each position of ``token_ids``


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
    "temperature": Bound(0.0, 2.0),
    "top_p": Bound(0.0, 1.0, above=True),
    "top_k": Bound(0, 1_000_000, whole=True),
    "min_p": Bound(0.0, 1.0),
    "seed": Bound(0, 2**63 - 1, whole=True),
    "logprobs": Bound(0, 20, whole=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn, and when to stop.

    Raises:
        InvalidField: a value is out of its bound; ``param`` is ``params.<name>``.
    """

    max_tokens: int = 64  #: generate at most this many
    temperature: float = 0.0  #: 0 takes the likeliest token
    top_p: float = 1.0  #: keep the likeliest tokens whose probabilities reach this sum
    top_k: int = 0  #: keep this many likeliest tokens; 0 keeps all
    min_p: float = 0.0  #: drop tokens less likely than this times the likeliest
    seed: int | None = None  #: None: derived from the job's id, so that a successor draws the same
    stop: tuple[str, ...] = ()  #: end before the first of these
    logprobs: int | None = None  #: log-probabilities of the token and of this many likeliest ones
    ignore_eos: bool = False  #: go on to max_tokens past the end of the text

    def __post_init__(self) -> None:
        for name, bound in BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in ("seed", "logprobs"):
                bound.check(f"params.{name}", value)
        _check_stop(self.stop)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidField("params.ignore_eos", "must be true or false")

    @classmethod
    def from_wire(cls, wire: object) -> SamplingParams:
        """Read the ``params`` object of a job.

        Raises:
            UnknownField, InvalidField: naming the field.
        """
        fields = _table("params", wire)
        refuse_unknown(fields, [f.name for f in dataclasses.fields(cls)], prefix="params.")
        stop = fields.get("stop", ())
        if isinstance(stop, str):
            stop = (stop,)
        if not isinstance(stop, list | tuple):
            raise InvalidField("params.stop", "must be a string or a list of strings")
        return cls(**{**fields, "stop": tuple(stop)})

    def to_wire(self) -> Wire:
        """Only what differs from the defaults: a job's hash stays small."""
        wire = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {**wire, "stop": list(self.stop)} if self.stop else wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str

    def to_wire(self) -> Wire:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the client asked. Exactly one of ``prompt``, ``messages`` and ``token_ids`` is given."""

    kind: Kind = Kind.GENERATE
    model: str | None = None  #: None: the server's own
    prompt: str | None = None  #: raw text
    messages: tuple[Message, ...] | None = None  #: a chat, put through the model's own template
    token_ids: tuple[int, ...] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "messages", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidField("input", f"must hold exactly one of {', '.join(INPUTS[self.kind])}")
        if given[0] == "prompt":
            _check_prompt(self.prompt)
        elif given[0] == "messages":
            _check_messages(self.messages or ())
        else:
            _check_token_ids(f"input.{self._token_ids_name}", self.token_ids or ())
        if self.model is not None and not (isinstance(self.model, str) and 0 < len(self.model) <= MAX_MODEL_CHARACTERS):
            raise InvalidField("model", f"must be a string of 1 to {MAX_MODEL_CHARACTERS} characters")

    @classmethod
    def from_wire(cls, wire: object, *, kind: Kind | None = None) -> Request:
        """Read ``{"kind", "model", "input", "params"}``; ``kind`` is required unless the caller gives it.

        Raises:
            RequestError: naming the field (``kind``, ``model``, ``input.prompt``, ``params.top_p`` …) and its bound.
        """
        fields = _table("", wire)
        refuse_unknown(fields, ("kind", "model", "input", "params"))
        actual = _kind(fields.get("kind", kind))
        if kind is not None and actual is not kind:
            raise InvalidField("kind", f"must be {kind.value!r} here, not {actual.value!r}")
        if "input" not in fields:
            raise InvalidField("input", f"is required: one of {', '.join(INPUTS[actual])}")
        asked = _table("input", fields["input"])
        refuse_unknown(asked, INPUTS[actual], prefix="input.")
        if len(asked) != 1:
            raise InvalidField("input", f"must hold exactly one of {', '.join(INPUTS[actual])}")
        if actual is Kind.PREDICT and fields.get("params"):
            raise InvalidField("params", "kind 'predict' takes none")
        return cls(
            kind=actual,
            model=fields.get("model"),
            params=SamplingParams.from_wire({} if fields.get("params") is None else fields["params"]),
            **_read_input(asked),
        )

    def to_wire(self) -> Wire:
        """The JSON object that ``from_wire`` reads back to an equal request."""
        wire: Wire = {"kind": self.kind.value, "input": self._input_to_wire()}
        if self.model is not None:
            wire["model"] = self.model
        if params := self.params.to_wire():
            wire["params"] = params
        return wire

    def _input_to_wire(self) -> Wire:
        if self.prompt is not None:
            return {"prompt": self.prompt}
        if self.messages is not None:
            return {"messages": [message.to_wire() for message in self.messages]}
        return {self._token_ids_name: list(self.token_ids or ())}

    @property
    def _token_ids_name(self) -> str:
        return "token_ids" if self.kind is Kind.PREDICT else "prompt_token_ids"


#: What ``input`` may hold, by kind.
INPUTS: Mapping[Kind, tuple[str, ...]] = {
    Kind.GENERATE: ("prompt", "messages", "prompt_token_ids"),
    Kind.PREDICT: ("token_ids",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The natural-log probability of one drawn token, and of the likeliest ones, before any filter or temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def to_wire(self) -> Wire:
        top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in self.top]
        return {"token_id": self.token_id, "logprob": self.logprob, "top": top}

    @classmethod
    def from_wire(cls, wire: Wire) -> TokenLogprob:
        top = tuple((t["token_id"], t["logprob"]) for t in wire["top"])
        return cls(token_id=wire["token_id"], logprob=wire["logprob"], top=top)


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """What an earlier attempt has published of one choice: where a successor starts from."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  #: as long as token_ids when the request asks for them, else empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer."""

    index: int = 0
    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None

    def to_wire(self) -> Wire:
        logprobs = None if self.logprobs is None else [logprob.to_wire() for logprob in self.logprobs]
        return {
            "index": self.index,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "token_ids": list(self.token_ids),
            "logprobs": logprobs,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens, counted."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0  #: prompt tokens whose keys and values were at hand already

    def to_wire(self) -> Wire:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is stored at the end: choices for GENERATE, token ids for PREDICT."""

    usage: Usage
    choices: tuple[Choice, ...] = ()
    token_ids: tuple[int, ...] | None = None

    def to_wire(self) -> Wire:
        if self.token_ids is not None:
            return {"token_ids": list(self.token_ids), "usage": self.usage.to_wire()}
        return {"choices": [choice.to_wire() for choice in self.choices], "usage": self.usage.to_wire()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One or more new tokens of a choice; the text may be empty while characters are held back."""

    job_id: str
    index: int = 0
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """The job has its result; the last of its events."""

    job_id: str
    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedEvent:
    """The job cannot be computed; the last of its events."""

    job_id: str
    error: Exception


Event: TypeAlias = TokenEvent | FinishedEvent | FailedEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What computes: enough to tell whether two workers compute alike, and what may be asked of them."""

    name: str  #: the name a request gives
    engine: str  #: "torch" or "instant"
    version: str  #: of Headrace
    dtype: str
    weights: str  #: sha256 of weights, configuration and tokenizer, hexadecimal
    kinds: tuple[str, ...]
    text: bool  #: has a tokenizer: takes prompts and answers with text
    chat: bool  #: has a chat template: takes messages
    max_model_len: int  #: prompt and answer together, in tokens
    vocab_size: int
    device: str = "cpu"

    @property
    def identity(self) -> str:
        """Equal for two workers exactly if one may go on where the other stopped."""
        return f"{self.engine}-{self.version}-{self.dtype}-{self.weights[:16]}"

    def to_wire(self) -> Wire:
        return {**dataclasses.asdict(self), "kinds": list(self.kinds)}

    @classmethod
    def from_wire(cls, wire: Wire) -> ModelCard:
        return cls(**{**wire, "kinds": tuple(wire["kinds"])})


def refuse_unknown(fields: Mapping[str, object], known: Collection[str], *, prefix: str = "") -> None:
    """Raise ``UnknownField``, with the nearest known name as its suggestion, for the first name not in ``known``."""
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UnknownField(f"{prefix}{name}", near[0] if near else None)


def _table(param: str, wire: object) -> Wire:
    if not isinstance(wire, dict) or not all(isinstance(key, str) for key in wire):
        raise InvalidField(param or "body", "must be a JSON object")
    return wire


def _kind(name: object) -> Kind:
    names = [kind.value for kind in Kind]
    if name is None:
        raise InvalidField("kind", f"is required: one of {', '.join(names)}")
    if name not in names:
        raise UnsupportedRequest("kind", f"must be one of {', '.join(names)}, not {name!r:.40}")
    return Kind(name)


def _read_input(asked: Wire) -> Wire:
    """Constructor arguments from ``input``; values are checked by the constructor."""
    [(name, value)] = asked.items()
    if name == "prompt":
        return {"prompt": value if value is not None else 0}  # 0: refused as "not a string", None would mean "absent"
    if not isinstance(value, list):
        raise InvalidField(f"input.{name}", "must be a list")
    if name == "messages":
        return {"messages": tuple(_message(f"input.messages.{i}", message) for i, message in enumerate(value))}
    return {"token_ids": tuple(value)}


def _message(param: str, wire: object) -> Message:
    fields = _table(param, wire)
    refuse_unknown(fields, ("role", "content"), prefix=f"{param}.")
    if fields.get("role") not in ROLES:
        raise InvalidField(f"{param}.role", f"must be one of {', '.join(ROLES)}")
    if not isinstance(fields.get("content"), str):
        raise InvalidField(f"{param}.content", "must be a string")
    return Message(**fields)


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str) or not 0 < len(prompt) <= MAX_PROMPT_CHARACTERS:
        raise InvalidField("input.prompt", f"must be a string of 1 to {MAX_PROMPT_CHARACTERS} characters")


def _check_messages(messages: tuple[Message, ...]) -> None:
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidField("input.messages", f"must hold 1 to {MAX_MESSAGES} messages")
    if sum(len(message.content) for message in messages) > MAX_PROMPT_CHARACTERS:
        raise InvalidField("input.messages", f"must hold at most {MAX_PROMPT_CHARACTERS} characters together")


def _check_token_ids(param: str, token_ids: tuple[object, ...]) -> None:
    if not 0 < len(token_ids) <= MAX_PROMPT_TOKENS:
        raise InvalidField(param, f"must hold 1 to {MAX_PROMPT_TOKENS} token ids")
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise InvalidField(param, f"must hold token ids from 0 to {MAX_TOKEN_ID}")


def _check_stop(stop: tuple[object, ...]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidField("params.stop", f"must hold at most {MAX_STOP_STRINGS} strings")
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidField("params.stop", f"must hold strings of 1 to {MAX_STOP_CHARACTERS} characters")
