"""A job's event log: a stream while it runs, one packed field of its hash once it has ended. Knows no command.

Packed, a log is ``R`` or ``I``, the number of its first event, and its events one after the other; numbers are LEB128,
but ids where an event has not just one: ``pack_ids``.
Each event begins with ``4 * bytes of its text + what it is`` (a ``Packed``). Texts follow their events where the log
says ``I`` (inline); with ``R`` they are the texts of the result, cut where the lengths say. ``lib/log.lua`` packs.
"""

from __future__ import annotations

import base64
import enum
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from core.bounds import Wire
from core.card import CHECKSUM_DIGITS, ModelCard
from core.request import Emitted, TokenEvent, TokenLogprob
from jobs.reports import LoggedEvent

_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


class Packed(enum.IntEnum):
    """What an event of a packed log is, and what follows its head."""

    TOKEN = 0  #: id; one token of the first choice, without log-probabilities
    TOKENS = 1  #: index of the choice, bytes of ids, the ids as in the stream, bytes of JSON, log-probabilities as JSON
    STARTED = 2  #: attempt, and what the head's "text" is here: the engine as JSON
    FINISHED = 3


def pack_event(event: TokenEvent) -> list[str | bytes]:
    """Text, ids, index and logprobs, as ``publish.lua`` takes them."""
    ids = pack_ids(event.token_ids)
    logprobs = "" if event.logprobs is None else dump([pack_logprob(each) for each in event.logprobs])
    return [event.text, ids, str(event.index), logprobs]


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as a log keeps them: how many bytes each takes, 2 or 4, and the numbers, the least byte first."""
    if not token_ids:
        return b""
    width, letter = (2, "H") if max(token_ids) < 1 << 16 else (4, "I")
    return struct.pack(f"<B{len(token_ids)}{letter}", width, *token_ids)


def read_ids(packed: bytes) -> list[int]:
    """The same back."""
    if not packed:
        return []
    width = packed[0]
    return [*struct.unpack_from(f"<{(len(packed) - 1) // width}{'H' if width == 2 else 'I'}", packed, 1)]


def pack_engine(card: ModelCard) -> str:
    """What a log's ``started`` says of who computes."""
    names = ("name", "engine", "version", "dtype")
    return dump({**{name: getattr(card, name) for name in names}, "weights": card.weights[:CHECKSUM_DIGITS]})


def read_log(answer: Sequence[Any], number: int = 0) -> list[LoggedEvent]:
    """Decode what ``lib/log.lua``'s ``read_log`` answers, from an event on."""
    packed, value, entries = answer
    events: list[LoggedEvent] = []
    if packed:
        texts = {} if value is None else _texts(json.loads(base64.b64decode(value)))
        events = [event for event in unpack_log(packed, texts) if event.number >= number]
    after = events[-1].number if events else number - 1
    return events + [event for event in map(read_entry, entries or ()) if event.number > after]


def unpack_log(packed: bytes, texts: Mapping[int, bytes]) -> Iterator[LoggedEvent]:
    """The events of a packed log; ``texts`` are the result's, by choice, where the log does without."""
    inline, at = packed[:1] == b"I", 1
    number, at = _number(packed, at)
    used = dict.fromkeys(texts, 0)
    while at < len(packed):
        event, at = _unpack_event(packed, at)
        if event.what is Packed.STARTED:
            at += event.bytes
            engine = json.loads(packed[at - event.bytes : at])
            yield LoggedEvent(number=number, type="started", fields={"attempt": event.attempt, "engine": engine})
        elif event.what is Packed.FINISHED:
            yield LoggedEvent(number=number, type="finished", fields={})
        else:
            if inline:
                text, at = packed[at : at + event.bytes], at + event.bytes
            else:
                start = used.get(event.index, 0)
                used[event.index] = start + event.bytes
                text = texts.get(event.index, b"")[start : start + event.bytes]
            yield LoggedEvent(number=number, type="token", fields=event.to_fields(text))
        number += 1


class _Event:
    """One event while it is unpacked."""

    __slots__ = ("attempt", "bytes", "index", "logprobs", "token_ids", "what")

    def __init__(self, what: Packed, length: int) -> None:
        self.what = what
        self.bytes = length  #: of its text
        self.index = 0
        self.attempt = 0
        self.token_ids: list[int] = []
        self.logprobs = b""

    def to_fields(self, text: bytes) -> Wire:
        fields: Wire = {"index": self.index, "text": text.decode(), "token_ids": self.token_ids}
        if self.logprobs:
            fields["logprobs"] = _read_logprobs(self.logprobs)
        return fields


def _unpack_event(packed: bytes, at: int) -> tuple[_Event, int]:
    head, at = _number(packed, at)
    event = _Event(Packed(head & 3), head >> 2)
    if event.what is Packed.TOKEN:
        token_id, at = _number(packed, at)
        event.token_ids.append(token_id)
    elif event.what is Packed.STARTED:
        event.attempt, at = _number(packed, at)
    elif event.what is Packed.TOKENS:
        event.index, at = _number(packed, at)
        size, at = _number(packed, at)
        event.token_ids, at = read_ids(packed[at : at + size]), at + size
        size, at = _number(packed, at)
        event.logprobs, at = packed[at : at + size], at + size
    return event, at


def _number(packed: bytes, at: int) -> tuple[int, int]:
    """A LEB128 number, and where it ends."""
    byte = packed[at]
    if byte < 128:
        return byte, at + 1
    value, shift = byte & 127, 7
    while True:
        at += 1
        byte = packed[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + 1
        shift += 7


def read_entry(entry: tuple[bytes, Sequence[bytes]]) -> LoggedEvent:
    """One stream entry as a script answers it: id, fields and values in turn."""
    return read_event(entry[0], dict(zip(entry[1][::2], entry[1][1::2], strict=True)))


def read_event(entry_id: bytes, fields: Mapping[bytes, bytes]) -> LoggedEvent:
    """One stream entry."""
    number = int(entry_id.split(b"-")[0]) - 1
    if b"f" in fields:
        return LoggedEvent(number=number, type="finished", fields={})
    if b"a" in fields:
        started = {"attempt": int(fields[b"a"]), "engine": json.loads(fields[b"e"])}
        return LoggedEvent(number=number, type="started", fields=started)
    token: Wire = {
        "index": int(fields.get(b"x", 0)),
        "text": fields[b"t"].decode(),
        "token_ids": read_ids(fields.get(b"i", b"")),
    }
    if b"l" in fields:
        token["logprobs"] = _read_logprobs(fields[b"l"])
    return LoggedEvent(number=number, type="token", fields=token)


def read_emitted(events: Sequence[LoggedEvent]) -> tuple[Emitted, ...]:
    """What a log says was drawn, by choice."""
    drawn = _by_choice(events)
    choices = (drawn.get(index, ([], [])) for index in range(max(drawn, default=-1) + 1))
    return tuple(
        Emitted(token_ids=tuple(token_ids), logprobs=tuple(map(TokenLogprob.from_wire, logprobs)))
        for token_ids, logprobs in choices
    )


def complete(result: Wire, events: Sequence[LoggedEvent]) -> Wire:
    """A stored result with what its log alone holds: token ids and log-probabilities of each choice; all unpacked."""
    if "choices" not in result:
        return result
    drawn = _by_choice(events)
    choices = []
    for choice in result["choices"]:
        token_ids, logprobs = drawn.get(choice["index"], ([], []))
        choices.append({**choice, "token_ids": token_ids, "logprobs": logprobs or None})
    if result.get("prompt_logprobs") is None:
        return {**result, "choices": choices}
    scored = [each and _read_logprob(each).to_wire() for each in result["prompt_logprobs"]]
    return {**result, "choices": choices, "prompt_logprobs": scored}


def _by_choice(events: Sequence[LoggedEvent]) -> dict[int, tuple[list[int], list[Wire]]]:
    """Token ids and log-probabilities of each choice."""
    drawn: dict[int, tuple[list[int], list[Wire]]] = {}
    for event in events:
        if event.type == "token":
            token_ids, logprobs = drawn.setdefault(event.fields["index"], ([], []))
            token_ids += event.fields["token_ids"]
            logprobs += event.fields.get("logprobs", ())
    return drawn


def dump(value: object) -> str:
    """JSON without a needless byte."""
    return _ENCODER.encode(value)


def _texts(result: Wire) -> dict[int, bytes]:
    return {choice["index"]: choice["text"].encode() for choice in result.get("choices", ())}


def _read_logprobs(packed: bytes) -> list[Wire]:
    return [_read_logprob(each).to_wire() for each in json.loads(packed)]


def pack_logprob(logprob: TokenLogprob) -> list[Any]:
    """Its bare values, to six digits."""
    top = [[token_id, round(value, 6)] for token_id, value in logprob.top]
    return [logprob.token_id, round(logprob.logprob, 6), top]


def _read_logprob(packed: Sequence[Any]) -> TokenLogprob:
    token_id, logprob, top = packed
    return TokenLogprob(token_id=token_id, logprob=logprob, top=tuple((one, value) for one, value in top))
