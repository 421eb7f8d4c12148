"""Every operation as a value: which script, with which arguments, and how its answer reads. Knows no connection."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from core.bounds import Wire
from core.card import ModelCard
from core.errors import DeadlineUnreachable, JobConflict, JobNotFound, QueueFull, StoreFull
from core.request import Kind
from jobs import keys, logs, rows
from jobs.job import LABELS, QUEUE, Job, JobState, NewJob, Resume
from jobs.memory import MemoryReport
from jobs.reports import CallbackReport, LoggedEvent, QueueReport, Submitted, WorkerCard
from jobs.rows import Row
from jobs.scripting import Command, pack_exc
from jobs.settings import StoreSettings
from jobs.work import Beat, ClaimedJob, Publication, ReapReport, Settlement, Wanted

REFUSED, DONE, REPEATED, HAS_DEPENDENTS, CANCEL_WANTED, WATCHED = 0, 1, 2, 3, 4, 5
FULL_QUEUE, FULL_STORE, LATE = -1, -2, -3  #: why a submission was refused
LOOKS = 512  #: ids one claim may look at
LONGEST_HOW = 120  #: characters of how a worker died
SWEEP = 500  #: jobs one call of expire, promote or reap may move


def submit(job: NewJob, settings: StoreSettings, memory: MemoryReport) -> Command[Submitted]:
    """Create a job; its decoding raises QueueFull, StoreFull, DeadlineUnreachable, which no known id meets."""
    kind, model = job.request.kind, job.request.model or ""
    deadline = "" if job.deadline_seconds is None else round(job.deadline_seconds * 1000)
    fields: list[Any] = ["origin", QUEUE, "description", LABELS[kind], "timeout", -1]
    fields += ["result_ttl", job.result_ttl_seconds, "failure_ttl", job.result_ttl_seconds]
    if job.resume is not Resume.RESTART:
        fields += ["resume", job.resume.value]
    if job.webhook is not None:
        fields += ["webhook", job.webhook]
    if job.awaited:
        fields += ["awaited", 1]
    bounds: list[Any] = [settings.max_queued, int(memory.full), int(job.refuse_if_late)]
    priority = job.request.priority
    if job.metadata:
        fields += ["metadata", json.dumps(dict(job.metadata))]

    def decode(answer: Any) -> Submitted:
        code, found, *rest = answer
        if code == FULL_QUEUE:
            raise QueueFull(found, settings.max_queued, rest[0])
        if code == FULL_STORE:
            raise StoreFull(memory.used_bytes, memory.limit_bytes)
        if code == LATE:
            raise DeadlineUnreachable(found, job.deadline_seconds or 0)
        if code == 0:
            known = dataclasses.replace(_job(found, job.id), request=rows.read_asked(rest[0]))
            return Submitted(job=known, created=False)
        return Submitted(job=rows.read_created_job(job, found, *rest), created=True)

    data = rows.pack_request(job.request)
    return Command("submit", [job.id, kind.value, model, deadline, *bounds, data, priority, *fields], decode)


def get(job_id: str) -> Command[Row]:
    """Read a job; its decoding raises JobNotFound."""
    return Command("get", [job_id], lambda answer: _row(answer, job_id))


def over(job_ids: Sequence[str]) -> Command[list[str]]:
    """Those of the jobs that have ended, or are unknown: a glance that reads none of them."""
    return Command("over", job_ids, lambda answer: [job_id.decode() for job_id in answer])


def page(
    states: Collection[JobState], kinds: Collection[Kind], after: str | None, limit: int
) -> Command[tuple[list[Job], list[str]]]:
    """Read jobs, newest first, and the ids whose index entries are stale; its decoding raises JobNotFound for after."""
    merged = [f"{kind}:{state}" for kind in (kinds or Kind) for state in (states or JobState)]

    def decode(answer: Any) -> tuple[list[Job], list[str]]:
        if not answer[0]:
            raise JobNotFound(after or "")
        return [_job(row, "") for row in answer[1]], [job_id.decode() for job_id in answer[2]]

    return Command("list", [after or "", limit, *merged], decode)


def reindex(job_ids: Iterable[str]) -> Command[int]:
    """Let the index, the log and the retention learn what stock RQ did to these jobs."""
    return Command("reindex", list(job_ids), int)


def cancel(job_id: str) -> Command[Job]:
    """Its decoding raises JobNotFound, JobConflict."""
    return _move("cancel", job_id, "has ended already: {state}")


def retry(job_id: str) -> Command[Job]:
    """Its decoding raises JobNotFound, JobConflict."""
    return _move("retry", job_id, "is {state}; only a failed job can be retried")


def resend(job_id: str) -> Command[Job]:
    """Its decoding raises JobNotFound, JobConflict."""
    return _move("resend", job_id, "is {state}, and there is nothing to send: no webhook, or no end yet")


def delete(job_id: str) -> Command[None]:
    """Its decoding raises JobNotFound, JobConflict."""

    def decode(answer: Any) -> None:
        _moved(answer, job_id, "is {state}; cancel it first")

    return Command("delete", [job_id], decode)


def events(job_id: str, after: int) -> Command[list[LoggedEvent]]:
    """Read the log from event ``after + 1`` on."""
    return Command("log", [job_id, after + 1], lambda answer: logs.read_log(answer, after + 1))


def follow(job_id: str, after: int) -> Command[list[LoggedEvent]]:
    """The same for somebody who goes on reading: from now on the job's worker publishes promptly."""
    return Command("follow", [job_id, after + 1], lambda answer: logs.read_log(answer, after + 1))


def show(job_id: str, after: int) -> Command[list[LoggedEvent]]:
    """The same for a reader outside: from now on the answer is not started over."""
    return Command("show", [job_id, after + 1], lambda answer: logs.read_log(answer, after + 1))


def workers() -> Command[list[WorkerCard]]:
    return Command("workers", [], lambda answer: [rows.read_card(row) for row in answer])


def known_models() -> Command[list[ModelCard]]:
    return Command("models", [], lambda answer: [ModelCard.from_wire(json.loads(card)) for card in answer])


def queue() -> Command[QueueReport]:
    def decode(answer: Any) -> QueueReport:
        rate, suspects, dead, waiting, delivered, failed, *counts = answer
        return QueueReport(
            states=dict(zip(JobState, counts, strict=True)),
            completions_per_second=float(rate),
            suspects=suspects,
            dead_letters=dead,
            callbacks=CallbackReport(waiting=waiting, delivered=delivered, failed=failed),
        )

    return Command("queue", [], decode)


def birth(card: WorkerCard, settings: StoreSettings) -> Command[int]:
    name, model = ("", "") if card.model is None else (card.model.name, json.dumps(card.model.to_wire()))
    return Command("birth", [card.name, _ms(settings.lease_seconds), rows.pack_card(card), name, model], int)


def renew(
    worker: str, state: str, running: Mapping[str, int], stats: Wire, card: str, settings: StoreSettings
) -> Command[Beat]:
    """Renew a lease; ``card`` is the worker's, packed, and shown again where it was swept. Empty: nothing is."""

    def decode(answer: Any) -> Beat:
        lost, cancels, suspended, unknown = answer
        return Beat(
            lost=tuple(job_id.decode() for job_id in lost),
            cancels=tuple(job_id.decode() for job_id in cancels),
            suspended=bool(suspended),
            unknown=tuple(_member(member) for member in unknown),
        )

    members = [f"{job_id}:{attempt}" for job_id, attempt in running.items()]
    args = [worker, _ms(settings.lease_seconds), state, json.dumps(stats), card, *members]
    return Command("renew", args, decode)


def death(worker: str) -> Command[int]:
    return Command("death", [worker], int)


def claim(wanted: Wanted, settings: StoreSettings) -> Command[list[Any]]:
    """Take jobs; the raw answer, because what stock RQ put in has to be read and adopted first."""
    card = wanted.card
    engine = [card.name, logs.pack_engine(card), LOOKS, card.identity, _ms(settings.resume_wait_seconds)]
    return Command("claim", [wanted.worker, wanted.room, wanted.running, *engine], list)


def waiting(card: ModelCard) -> Command[int]:
    """How many of the lists that ``claim`` takes from hold something: a look that costs next to nothing."""
    model = card.name.lower()
    lists = [name for each in (keys.URGENT, keys.READY, keys.LOW, keys.SUSPECTS) for name in (f"{each}.{model}", each)]
    return Command("EXISTS", [*lists, keys.LIKE + card.identity, keys.LIKE_SUSPECTS + card.identity], int)


def adopt(job: ClaimedJob, kind: Kind, model: str, priority: int, created: int, *, route: bool) -> Command[int]:
    return Command("adopt", [job.id, job.attempt, kind.value, model, priority, created, int(route)], int)


def publish(publications: Sequence[Publication]) -> Command[list[int]]:
    """Append events of several jobs; a code for each."""
    args: list[Any] = []
    for each in publications:
        args += [each.job_id, each.attempt, each.first, each.age_ms, len(each.events)]
        for event in each.events:
            args += logs.pack_event(event)
    return Command("publish", args, list)


def settle(settlement: Settlement, last_words: Publication | None = None) -> Command[int]:
    """End an attempt, and append its last events before that."""
    value, error, exc, text_bytes = b"", "", "", 0
    if settlement.result is not None:
        value = rows.pack_result(settlement.result)
        text_bytes = sum(len(choice.text.encode()) for choice in settlement.result.choices)
    if settlement.error is not None:
        error = rows.pack_error(settlement.error)
        exc = pack_exc(settlement.traceback or f"{type(settlement.error).__name__}: {settlement.error}")
    args: list[Any] = [settlement.job_id, settlement.attempt, settlement.outcome.value, int(settlement.permanent)]
    args += [value, error, exc, text_bytes]
    if last_words is not None:
        args += [last_words.first, last_words.age_ms]
        for event in last_words.events:
            args += logs.pack_event(event)
    return Command("settle", args, int)


def release(job_id: str, attempt: int) -> Command[int]:
    return Command("release", [job_id, attempt], int)


def reap(settings: StoreSettings, buried: str = "", how: str = "") -> Command[tuple[ReapReport, bool]]:
    """Take jobs from dead workers; also whether there is more to do.

    Args:
        buried: a worker that was seen to die, and how.
    """

    def decode(answer: Any) -> tuple[ReapReport, bool]:
        requeued, ended, dead, gone, more = answer
        names, ids = tuple(name.decode() for name in gone), tuple(job_id.decode() for job_id in dead)
        return ReapReport(requeued=requeued, ended=ended, dead=ids, workers=names), bool(more)

    return Command("reap", [_ms(settings.grace_seconds), SWEEP, buried, how[:LONGEST_HOW]], decode)


def expire() -> Command[tuple[int, bool]]:
    """End, forget and pack; how many ended or were forgotten, and whether there is more to do."""
    return Command("expire", [SWEEP], lambda answer: (answer[0], bool(answer[1])))


def promote() -> Command[tuple[int, bool]]:
    return Command("promote", [SWEEP], lambda answer: (answer[0], bool(answer[1])))


def dependents_wait() -> Command[tuple[int, bool]]:
    """Of how many ended jobs RQ's code has yet to release what waits for them, and whether there are any."""
    return Command("SCARD", [keys.DEPENDENTS], lambda count: (count, count > 0))


def _move(name: str, job_id: str, problem: str) -> Command[Job]:
    return Command(name, [job_id], lambda answer: _moved(answer, job_id, problem))


def _moved(answer: Any, job_id: str, problem: str) -> Any:
    """The job after its move; raises JobNotFound for 0, JobConflict for -1."""
    code, *rest = answer
    if code == 0:
        raise JobNotFound(job_id)
    job = _job(rest[0], job_id) if rest else None
    if code < 0 and job is not None:
        raise JobConflict(job_id, problem.format(state=job.state.value))
    return job


def _row(answer: Any, job_id: str) -> Row:
    row = rows.read_row(answer)
    if row is None:
        raise JobNotFound(job_id)
    return row


def _job(answer: Any, job_id: str) -> Job:
    return _row(answer, job_id).job


def _member(member: bytes) -> tuple[str, int]:
    job_id, _, attempt = member.decode().rpartition(":")
    return job_id, int(attempt)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
