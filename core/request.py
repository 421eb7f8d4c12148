"""The shared words: what is asked (Request), what happens (Event), what is kept (Result).

Standard library only, so that ``api`` and ``jobs`` speak of requests without torch. Everything is frozen, every field
has a bound, and ``Request.from_wire`` raises a ``RequestError`` that names the field and the bound.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from core import bounds
from core.bounds import MAX_MODEL_CHARACTERS, MAX_SALT_CHARACTERS, ROLES, Wire, refuse_unknown, table
from core.errors import InvalidField, UnsupportedRequest
from core.params import SamplingParams as SamplingParams

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "deadline"]


class Kind(enum.StrEnum):
    """What is to be computed. Values are on the wire and in Redis: add, never rename."""

    GENERATE = "generate"  #: continue a prompt, a chat or token ids
    PREDICT = "predict"  #: the likeliest next token id at each position of ``token_ids``


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
    cache_salt: str | None = None  #: only requests with the same one share cached prompts
    priority: int = 0  #: the lower, the earlier

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "messages", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidField("input", f"must hold exactly one of {', '.join(INPUTS[self.kind])}")
        if given[0] == "prompt":
            bounds.check_prompt(self.prompt)
        elif given[0] == "messages":
            bounds.check_messages([message.content for message in self.messages or ()])
        else:
            bounds.check_token_ids(f"input.{self._token_ids_name}", self.token_ids or ())
        if self.model is not None and not (isinstance(self.model, str) and 0 < len(self.model) <= MAX_MODEL_CHARACTERS):
            raise InvalidField("model", f"must be a string of 1 to {MAX_MODEL_CHARACTERS} characters")
        salt = self.cache_salt
        if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT_CHARACTERS):
            raise InvalidField("cache_salt", f"must be a string of 1 to {MAX_SALT_CHARACTERS} characters")
        bounds.PRIORITY.check("priority", self.priority)

    @classmethod
    def from_wire(cls, wire: object, *, kind: Kind | None = None) -> Request:
        """Read an object of ``FIELDS``, of which ``input`` is required, and ``kind`` unless the caller gives it.

        Raises:
            RequestError: naming the field (``kind``, ``model``, ``input.prompt``, ``params.top_p`` …) and its bound.
        """
        fields = table("", wire)
        refuse_unknown(fields, FIELDS)
        actual = _kind(fields.get("kind", kind))
        if kind is not None and actual is not kind:
            raise InvalidField("kind", f"must be {kind.value!r} here, not {actual.value!r}")
        if "input" not in fields:
            raise InvalidField("input", f"is required: one of {', '.join(INPUTS[actual])}")
        asked = table("input", fields["input"])
        refuse_unknown(asked, INPUTS[actual], prefix="input.")
        if len(asked) != 1:
            raise InvalidField("input", f"must hold exactly one of {', '.join(INPUTS[actual])}")
        if actual is Kind.PREDICT and fields.get("params"):
            raise InvalidField("params", "kind 'predict' takes none")
        return cls(
            kind=actual,
            model=fields.get("model"),
            cache_salt=fields.get("cache_salt"),
            priority=fields.get("priority", 0),
            params=SamplingParams.from_wire({} if fields.get("params") is None else fields["params"]),
            **_read_input(asked),
        )

    def to_wire(self) -> Wire:
        """The JSON object that ``from_wire`` reads back to an equal request."""
        wire: Wire = {"kind": self.kind.value, "input": self._input_to_wire()}
        if self.model is not None:
            wire["model"] = self.model
        if self.cache_salt is not None:
            wire["cache_salt"] = self.cache_salt
        if self.priority:
            wire["priority"] = self.priority
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


#: What a request may hold.
FIELDS = ("kind", "model", "input", "params", "cache_salt", "priority")
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
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = (
        None  #: by position; None for the first, which follows none
    )

    def to_wire(self) -> Wire:
        if self.token_ids is not None:
            return {"token_ids": list(self.token_ids), "usage": self.usage.to_wire()}
        wire = {"choices": [choice.to_wire() for choice in self.choices], "usage": self.usage.to_wire()}
        if self.prompt_logprobs is None:
            return wire
        return {**wire, "prompt_logprobs": [each and each.to_wire() for each in self.prompt_logprobs]}


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
    fields = table(param, wire)
    refuse_unknown(fields, ("role", "content"), prefix=f"{param}.")
    if fields.get("role") not in ROLES:
        raise InvalidField(f"{param}.role", f"must be one of {', '.join(ROLES)}")
    if not isinstance(fields.get("content"), str):
        raise InvalidField(f"{param}.content", "must be a string")
    return Message(**fields)
