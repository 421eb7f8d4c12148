"""From what Redis holds to our own values, and back. Knows no command."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from core.bounds import Wire
from core.card import ModelCard
from core.errors import HeadraceError, InvalidField, UnsupportedRequest
from core.request import Kind, Request, Result
from jobs.job import FINAL, FUNCTIONS, LABELS, Job, JobState, NewJob, Resume, Webhook
from jobs.logs import complete, dump, pack_logprob, read_log
from jobs.reports import WorkerCard
from jobs.scripting import SEEN

STATES: Mapping[str, JobState] = {
    "started": JobState.RUNNING,
    "finished": JobState.SUCCEEDED,
    "failed": JobState.FAILED,
    "canceled": JobState.CANCELLED,
    "stopped": JobState.CANCELLED,
}  #: RQ's status -> ours; what is not here waits: queued, scheduled, deferred, rate_limited …
EXPIRED_REASON = "deadline"
SHORT_BITS = 12  #: of the length of a text that is compressed with small tables
SEEN_BYTES = [name.encode() for name in SEEN]

#: What is known of a worker's death: ``at`` in Unix seconds, ``tokens`` published by then, jobs beside this one.
DEATH = ("attempt", "worker", "host", "how", "at", "tokens", "neighbours")


@dataclass(frozen=True, slots=True)
class Row:
    """A job as read, and what only the store needs of it."""

    job: Job
    events: int  #: how many were ever logged
    stale: bool  #: stock RQ moved it: the index has to learn of it


def read_row(row: Sequence[Any] | None) -> Row | None:
    """Decode what ``lib/base.lua``'s ``read`` answers; None for an unknown id."""
    if row is None:
        return None
    raw = dict(zip(SEEN, row, strict=False))
    stored, unpacked, before_first, job_id, told = row[len(SEEN) :]
    reason = _text(raw["reason"])
    state = STATES.get(_text(raw["status"]) or "", JobState.QUEUED)
    if state is JobState.FAILED and reason == EXPIRED_REASON:
        state = JobState.EXPIRED
    over = state in FINAL
    entry = _pairs(stored)
    job = Job(
        id=job_id.decode(),
        state=state,
        kind=Kind(_text(raw["kind"]) or Kind.GENERATE),
        model=_text(raw["model"]) or None,
        created_at=_moment(raw["created_at"]) or 0.0,
        started_at=_moment(raw["started_at"]),
        first_token_at=_seconds(raw["first_token_at"]),
        finished_at=_moment(raw["ended_at"]) if over else None,
        expires_at=_seconds(raw["expires_at"]) if over else None,
        deadline_at=_seconds(raw["deadline_at"]),
        attempt=int(raw["attempt"] or 0),
        crashes=int(raw["crashes"] or 0),
        deaths=_read_deaths(raw["deaths"]),
        worker=_text(raw["worker_name"]) or None,
        tokens_generated=int(raw["tokens"] or 0),
        cancel_requested=raw["cancel_requested"] is not None,
        resume=Resume(_text(raw["resume"]) or Resume.RESTART),
        waiting_for=_text(raw["waiting_for"]),
        priority=int(raw["priority"] or 0),
        queue_position=_position(raw["ticket"], before_first) if state is JobState.QUEUED else None,
        result=_read_result(entry, raw["log"], unpacked) if over else None,
        error=_read_error(raw["error"], entry) if state is JobState.FAILED else None,
        reason=reason if over else None,
        metadata=json.loads(raw["metadata"]) if raw["metadata"] else {},
        webhook=_read_webhook(raw, told),
        result_ttl_seconds=int(raw["result_ttl"] or 86_400),
    )
    stale = _text(raw["place"]) != state or (over and raw["closed"] is None)
    return Row(job, int(raw["events"] or 0), stale)


def read_created_job(new: NewJob, at: bytes, deadline: int | None, ticket: int, before_first: int) -> Job:
    """The job that ``submit.lua`` has just made, without reading it again."""
    return Job(
        id=new.id,
        state=JobState.QUEUED,
        kind=new.request.kind,
        created_at=_moment(at) or 0.0,
        model=new.request.model,
        request=new.request,
        deadline_at=None if deadline is None else deadline / 1000,
        resume=new.resume,
        priority=new.request.priority,
        queue_position=max(1, ticket - before_first),
        metadata=new.metadata,
        webhook=Webhook(url=new.webhook) if new.webhook else None,
        result_ttl_seconds=new.result_ttl_seconds,
    )


def read_told(fields: Mapping[bytes, bytes]) -> Row | None:
    """Decode what ``lib/base.lua``'s ``tell_end`` tells of an end; None where that is nothing but the end."""
    if b"status" not in fields:
        return None
    result = [part for name, value in fields.items() if name.startswith(b".") for part in (name[1:], value)]
    return read_row([*map(fields.get, SEEN_BYTES), result, None, None, fields[b"j"], None])


def pack_request(request: Request) -> bytes:
    """RQ's ``data`` of a job: what ``Queue.enqueue(label, wire)`` with RQ's JSON serializer makes, less its spaces."""
    return _deflate(json.dumps([LABELS[request.kind], None, [request.to_wire()], {}], separators=(",", ":")).encode())


def read_request(data: bytes) -> Request:
    """What a job asks for. The function's name is looked up, never imported.

    Raises:
        HeadraceError: RequestError, or whatever else makes it no job of ours.
    """
    try:
        name, instance, args, kwargs = json.loads(_inflate(data))
    except (ValueError, TypeError, RecursionError, zlib.error):
        raise UnsupportedRequest("data", "must be written by rq.serializers.JSONSerializer") from None
    kind = FUNCTIONS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UnsupportedRequest("function", f"must be one of {', '.join(FUNCTIONS)}, not {name!r:.80}")
    if instance is not None or kwargs or not isinstance(args, list) or len(args) != 1:
        raise InvalidField("args", f"{name} takes exactly one argument, the request as a JSON object")
    return Request.from_wire(args[0], kind=kind)


def read_asked(data: bytes) -> Request | None:
    """What a job asks for; None for what we cannot read."""
    try:
        return read_request(data)
    except HeadraceError:
        return None


def refuse_extras(callbacks: Sequence[bytes | None], repeats: bytes | None, webhooks: bytes | None) -> None:
    """Raise ``UnsupportedRequest`` for what RQ would do around a job, and we do not."""
    if any(callbacks):
        raise UnsupportedRequest("on_success", "callbacks are not run here: nothing out of Redis is imported")
    if int(repeats or 0) > 0:
        raise UnsupportedRequest("repeat", "is not supported; enqueue the job again")
    if webhooks and json.loads(webhooks):
        raise UnsupportedRequest("webhooks", "are not sent from here")


def pack_card(card: WorkerCard) -> str:
    """The part of a card that does not change."""
    model = card.model.to_wire() if card.model else None
    return dump({"host": card.host, "pid": card.pid, "boot_id": card.boot_id, "model": model})


def read_card(row: Sequence[Any]) -> WorkerCard:
    """Decode a row of ``workers.lua``."""
    name, card, state, running, stats, started_at = row
    fixed = json.loads(card)
    return WorkerCard(
        name=name.decode(),
        host=fixed["host"],
        pid=fixed["pid"],
        boot_id=fixed["boot_id"],
        model=ModelCard.from_wire(fixed["model"]) if fixed["model"] else None,
        state=_text(state) or "idle",
        running=int(running or 0),
        started_at=_seconds(started_at) or 0.0,
        stats=json.loads(stats or b"{}"),
    )


def read_created(text: bytes | None) -> int:
    """RQ's ``created_at`` in microseconds; 0 where there is none."""
    return round((_moment(text) or 0.0) * 1e6)


def pack_result(result: Result) -> bytes:
    """RQ's return value of a job: texts, why they end, and the counts; ids and log-probabilities are in the log."""
    wire = result.to_wire()
    for choice in wire.get("choices", ()):
        del choice["token_ids"], choice["logprobs"]
    if result.prompt_logprobs is not None:
        wire["prompt_logprobs"] = [each and pack_logprob(each) for each in result.prompt_logprobs]
    return base64.b64encode(dump(wire).encode())


def pack_error(error: HeadraceError) -> str:
    return dump(error.to_wire())


def _pairs(flat: Sequence[bytes] | None) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True)) if flat else {}


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def _seconds(milliseconds: bytes | None) -> float | None:
    return float(milliseconds) / 1000 if milliseconds else None


def _moment(text: bytes | None) -> float | None:
    """A time as RQ writes it, in Unix seconds."""
    if not text:
        return None
    moment = datetime.fromisoformat(text.decode())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _position(ticket: bytes | None, before_first: int) -> int | None:
    return None if ticket is None else max(1, int(ticket) - before_first)


def _read_result(entry: Mapping[bytes, bytes], packed: bytes | None, unpacked: Sequence[Any] | None) -> Any:
    value = entry.get(b"return_value")
    if value is None:
        return None
    return complete(json.loads(base64.b64decode(value)), read_log((packed, None, unpacked)))


def _read_deaths(packed: bytes | None) -> tuple[Wire, ...]:
    return tuple({name: death.get(name) for name in DEATH} for death in json.loads(packed)) if packed else ()


def _read_webhook(raw: Mapping[str, bytes | None], told: Sequence[bytes | None] | None) -> Webhook | None:
    url = _text(raw["webhook"])
    if url is None:
        return None
    state, attempts, error = told or (None, None, None)
    return Webhook(
        url=url, id=_text(raw["callback"]), state=_text(state), attempts=int(attempts or 0), last_error=_text(error)
    )


def _read_error(error: bytes | None, entry: Mapping[bytes, bytes]) -> Wire:
    """Ours; or for a job that stock RQ failed, the last line of what it noted."""
    if error:
        found: Wire = json.loads(error)
        return found
    exc = entry.get(b"exc_string")
    text = zlib.decompress(base64.b64decode(exc)).decode() if exc else "failed by RQ"
    return {"code": "internal_error", "message": text.strip().splitlines()[-1], "param": None}


def _deflate(data: bytes) -> bytes:
    """As ``zlib.compress``, and as small; but a short text does not pay for tables of 256 KiB, which take four fifths
    of the time and push all else out of the caches."""
    window, memory = (SHORT_BITS, 5) if len(data) <= 1 << SHORT_BITS else (zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL)
    deflater = zlib.compressobj(wbits=window, memLevel=memory)
    return deflater.compress(data) + deflater.flush()


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompress(data)
    except zlib.error:
        return data  # RQ reads uncompressed jobs, too
