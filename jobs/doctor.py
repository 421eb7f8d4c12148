"""Looks through a queue for what cannot be, says what it is, and mends it. Prints nothing.

It may run beside a working house: each job is judged as it is at one moment, and mended by one script.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from core.bounds import Wire
from core.errors import UnsafeServer
from jobs import keys
from jobs.audit import mend, suspicious
from jobs.job import JobState
from jobs.store import Store

LATE_SECONDS = 60  #: so late a callback is noticed


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is not as it should be."""

    what: str  #: a job's id, a worker's name, or "server"
    problem: str
    done: str = ""  #: how it was mended; empty: it was not

    def to_wire(self) -> Wire:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found, and what a healthy house would like to know as well."""

    jobs: dict[str, int]  #: how many, by state
    workers: int  #: with a live lease
    dead_letters: int
    suspects: int
    findings: Sequence[Finding]
    notes: Sequence[str]  #: nothing is wrong, and somebody may wonder

    @property
    def healthy(self) -> bool:
        """Nothing was found, or all of it is mended."""
        return all(finding.done for finding in self.findings)

    def to_wire(self) -> Wire:
        wire = dataclasses.asdict(self)
        return {**wire, "healthy": self.healthy}


def examine(store: Store, *, fix: bool) -> Diagnosis:
    """Look at everything.

    Raises:
        StoreUnavailable: Redis is away.
    """
    client = store.connection
    findings = [*_look_at_server(store), *_look_at_workers(store, fix=fix), *_look_at_jobs(client, fix=fix)]
    report, workers = store.queue(), store.workers()
    return Diagnosis(
        jobs={state.value: report.states.get(state, 0) for state in JobState},
        workers=len(workers),
        dead_letters=report.dead_letters,
        suspects=report.suspects,
        findings=findings,
        notes=_notes(store),
    )


def _look_at_server(store: Store) -> list[Finding]:
    try:
        store.inspect()
    except UnsafeServer as error:
        return [Finding(what="server", problem=str(error))]
    return []


def _look_at_jobs(client: redis.Redis, *, fix: bool) -> list[Finding]:
    found = []
    for job_id, problems in suspicious(client):
        done = mend(client, job_id) if fix else ""
        found.append(Finding(what=job_id, problem="; ".join(problems), done=done))
    return found


def _look_at_workers(store: Store, *, fix: bool) -> list[Finding]:
    """Whoever holds jobs has a lease, be it one that ran out: without one nobody would ever sweep it."""
    client, found = store.connection, []
    for key in client.scan_iter(f"{keys.HELD}*", count=1000):
        name = key.decode().removeprefix(keys.HELD)
        if client.zscore(keys.LEASES, name) is None and (held := client.scard(key)):
            done = ""
            if fix:
                report = store.expire_lease(name)
                done = f"gave its jobs back: {report.requeued} go on"
            found.append(Finding(what=name, problem=f"holds {held} jobs and has no lease", done=done))
    return found


def _notes(store: Store) -> list[str]:
    """What explains why jobs wait."""
    client, notes = store.connection, []
    live = {card.model.identity for card in store.workers() if card.model}
    if client.exists(keys.SUSPENDED):
        notes.append("claiming is suspended (rq suspend): rq resume ends it")
    if not live:
        notes.append("no worker is alive: nothing is computed")
    now: Any = client.time()
    late: Any = client.zcount(keys.OUTBOX, "-inf", (now[0] - LATE_SECONDS) * 1000)
    if late:
        notes.append(f"{late} callbacks should have been sent by now: no courier runs, or not enough of them")
    lists: Any = client.smembers(keys.QUEUES)
    for key in sorted(each.decode() for each in lists):
        prefix = next((each for each in (keys.LIKE, keys.LIKE_SUSPECTS) if key.startswith(each)), None)
        engine = key.removeprefix(prefix or "")
        if prefix and engine not in live and (waiting := client.llen(key)):
            notes.append(
                f"{waiting} jobs wait for an engine {engine}, which began their answers: start one, "
                f"or they fail with engine_changed when their time is over"
            )
    if dead := client.zcard(keys.DEAD):
        notes.append(f"{dead} dead letters: headrace dead lists and explains them")
    return notes
