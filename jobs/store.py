"""A worker's door to Redis, for one caller at a time. What it says and hears: ``jobs.work`` and ``jobs.reports``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import redis

from core.bounds import Wire
from core.card import ModelCard
from core.request import Emitted, Kind
from jobs import commands, keys, rows
from jobs.arrivals import read_claim
from jobs.batch import Batch
from jobs.connection import connect, explain, explained, judge
from jobs.dependents import release_dependents
from jobs.durable import WAITS, check_on_disk
from jobs.job import Job, JobState, NewJob
from jobs.logs import read_emitted
from jobs.memory import Lately, MemoryReport, read_memory
from jobs.reports import LoggedEvent, QueueReport, ServerReport, Submitted, WorkerCard
from jobs.runner import Runner
from jobs.scripting import Command
from jobs.settings import StoreSettings
from jobs.wake import Sleeper
from jobs.work import Beat, Claim, ClaimedJob, Outcome, Publication, ReapReport, Reported, Settlement, Wanted

__all__ = [
    "Beat", "Claim", "ClaimedJob", "LoggedEvent", "Outcome", "Publication", "QueueReport", "ReapReport", "Reported",
    "ServerReport", "Settlement", "Store", "Submitted", "Wanted", "WorkerCard",
]  # fmt: skip

MOST_ROUNDS = 20  #: calls of one tick, each of bounded work


class Store:
    """Every operation, for one caller at a time. Each may raise StoreUnavailable; calling it again is harmless."""

    def __init__(self, settings: StoreSettings) -> None:
        """Take ``settings.redis_url``; nothing is sent yet."""
        self._settings = settings
        self._runner = Runner(connect(settings.redis_url), settings.result_ttl_seconds)
        self._sleeper = Sleeper(settings.redis_url)
        self._memory = Lately(self._look_at_memory)
        self._card: WorkerCard | None = None
        self._packed_card = ""

    @classmethod
    def connect(cls, settings: StoreSettings) -> Store:
        return cls(settings)

    @property
    def connection(self) -> redis.Redis:
        """The client: bytes out, no retries."""
        return self._runner.client

    def close(self) -> None:
        self._runner.close()
        self._sleeper.close()

    def inspect(self) -> ServerReport:
        """Look at the server, and give it our scripts.

        Raises:
            UnsafeServer: it cannot keep ``settings.durability``.
        """
        try:
            info = self._runner.client.info()
            report = judge(info, self._fsync(), self._settings)
            self._runner.load()
        except (redis.RedisError, OSError) as error:
            raise explain(error) from error
        return report

    # -- what anybody may do

    def submit(self, job: NewJob) -> Submitted:
        """Create a job, or find the one that has its id.

        Raises:
            QueueFull, StoreFull, DeadlineUnreachable; NotDurable: it is there, but the disk has not confirmed it: a
                repeat with the same id is safe.
        """
        command = commands.submit(job, self._settings, self._memory.get())
        wait = WAITS[self._settings.durability]
        if not wait:
            return self._runner.run(command)
        answer, synced = self._runner.answers([command], wait)
        submitted = command.decode(answer)
        check_on_disk(wait, synced)
        return submitted

    def get(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        row = self._runner.run(commands.get(job_id))
        if row.stale:
            self._runner.run(commands.reindex([job_id]))
            row = self._runner.run(commands.get(job_id))
        return row.job

    def list(
        self,
        *,
        states: Collection[JobState] = (),
        kinds: Collection[Kind] = (),
        after: str | None = None,
        limit: int = 20,
    ) -> list[Job]:
        """Jobs, newest first, of these states and kinds (all where none is given), behind the job ``after``.

        Raises:
            JobNotFound: ``after`` is unknown.
        """
        command = commands.page(states, kinds, after, limit)
        jobs, stale = self._runner.run(command)
        while stale:
            self._runner.run(commands.reindex(stale))
            jobs, stale = self._runner.run(command)
        return jobs

    def cancel(self, job_id: str) -> Job:
        """End a queued job; ask the worker of a running one to. Raises JobNotFound; JobConflict when it has ended."""
        return self._runner.run(commands.cancel(job_id))

    def retry(self, job_id: str) -> Job:
        """Queue a failed job again, from its beginning. Raises JobNotFound, JobConflict."""
        return self._runner.run(commands.retry(job_id))

    def delete(self, job_id: str) -> None:
        """Forget an ended job. Raises JobNotFound; JobConflict when it has not ended."""
        self._runner.run(commands.delete(job_id))

    def events(self, job_id: str, after: int = -1) -> Sequence[LoggedEvent]:
        """The log behind event ``after``; empty for an unknown job."""
        return self._runner.run(commands.events(job_id, after))

    def workers(self) -> Sequence[WorkerCard]:
        """Those with a live lease."""
        return self._runner.run(commands.workers())

    def known(self) -> Sequence[ModelCard]:
        """Of all workers there ever were, one a name."""
        return self._runner.run(commands.known_models())

    def queue(self) -> QueueReport:
        """Counts and speed."""
        return self._runner.run(commands.queue())

    # -- what a worker does

    def birth(self, card: WorkerCard) -> None:
        """Take a lease and show the card; again with another card, the card is replaced."""
        self._card, self._packed_card = card, rows.pack_card(card)
        self._runner.run(commands.birth(card, self._settings))

    def renew(
        self,
        worker: str,
        state: str,
        running: Mapping[str, int],
        stats: Wire,
        *,
        aside: Sequence[Sequence[Any]] = (),
    ) -> Beat:
        """Renew the lease, and hear what became of our jobs.

        Args:
            running: job id -> attempt of every job this worker knows, those with unsent settlements included.
            aside: bare Redis commands to send along; an error is an answer.
        """
        command = commands.renew(worker, state, running, stats, self._packed_card, self._settings)
        beat, answers = self._runner.run_with(command, aside)
        return dataclasses.replace(beat, aside=answers)

    def death(self, worker: str) -> None:
        """Give the lease up; release the jobs first."""
        self._runner.run(commands.death(worker))

    def claim(self, wanted: Wanted) -> Claim:
        """Take jobs that this model can compute, by one atomic script.

        Nothing while ``rq suspend`` holds, or without a lease (``birth`` first).
        """
        return self._read_claim(self._runner.run(commands.claim(wanted, self._settings)), wanted)

    def _read_claim(self, answer: Sequence[Any], wanted: Wanted) -> Claim:
        claim, adoptions = read_claim(answer, wanted.card, self._is_known)
        if adoptions:
            self._runner.answers(adoptions)
        return claim

    def report(
        self, publications: Sequence[Publication], settlements: Sequence[Settlement], wanted: Wanted | None = None
    ) -> Reported:
        """Write events and ends in one pipeline; then claim what is ``wanted``, or hear whether jobs wait."""
        batch = Batch(publications, settlements)
        last: list[Command[Any]] = [commands.claim(wanted, self._settings)] if wanted else []
        if wanted is None and self._card is not None and self._card.model is not None:
            last = [commands.waiting(self._card.model)]
        answers = self._runner.answers([*batch.commands, *last]) if batch.commands or last else []
        said, heard = answers[: len(batch.commands)], answers[len(batch.commands) :]
        reported = batch.read(said)
        if reported.with_dependents:
            self._release_dependents()
        if wanted is not None:
            return dataclasses.replace(reported, claim=self._read_claim(heard[0], wanted))
        return dataclasses.replace(reported, waiting=any(count > 0 for count in heard))

    def release(self, jobs: Iterable[tuple[str, int]]) -> None:
        """Hand jobs (id, attempt) back to the front of the queue, with their tokens; the first one ends up first."""
        batch = [commands.release(*job) for job in jobs]
        if batch:
            self._runner.answers(batch[::-1])

    def reap(self) -> ReapReport:
        """Take jobs from dead workers: a lease found over is marked, and swept after the grace."""
        return self._reap()

    def expire_lease(self, worker: str, how: str = "") -> ReapReport:
        """Take the jobs of a worker whose process is known to be dead, at once; each remembers how it died."""
        return self._reap(worker, how)

    def expire(self) -> int:
        """End queued jobs whose deadline has passed, forget ended ones whose time is over; how many."""
        return self._rounds(commands.expire())

    def promote(self) -> int:
        """Queue scheduled jobs that are due, and release what waits for ended ones; how many were due."""
        promoted = self._rounds(commands.promote())
        self._release_dependents()
        return promoted

    def tend(self) -> None:
        """Reap, expire and promote; in one round trip where there is little to do."""
        first = [commands.reap(self._settings), commands.expire(), commands.promote(), commands.dependents_wait()]
        more = [command.decode(answer)[1] for command, answer in zip(first, self._runner.answers(first), strict=True)]
        rest: list[Callable[[], object]] = [self.reap, self.expire, self.promote, self._release_dependents]
        for go_on in itertools.compress(rest, more):
            go_on()

    def wait(self, timeout_seconds: float) -> bool:
        """Block until a job may be there, for two seconds at most; False when none came."""
        card = self._card.model if self._card else None
        kinds = [card.identity, card.name.lower()] if card else []
        return self._sleeper.wait([*(f"{keys.WAKE}.{kind}" for kind in kinds), keys.WAKE], timeout_seconds)

    def interrupt(self) -> None:
        """Let a wait that goes on now raise StoreUnavailable at once: from a signal handler, or from any thread."""
        self._sleeper.interrupt()

    def emitted(self, job_id: str) -> tuple[Emitted, ...]:
        """What earlier attempts published, by choice."""
        return read_emitted(self.events(job_id))

    def _fsync(self) -> str:
        try:
            found: Any = self._runner.client.config_get("appendfsync")
        except redis.exceptions.NoPermissionError:
            return "unknown"
        return str(found.get("appendfsync", "unknown"))

    def _look_at_memory(self) -> MemoryReport:
        with explained():
            return read_memory(self._runner.client.info("memory"))

    def _is_known(self, model: str) -> bool:
        return any(card.name.lower() == model.lower() for card in self.known())

    def _release_dependents(self) -> None:
        try:
            release_dependents(self._runner.client)
        except (redis.RedisError, OSError) as error:
            raise explain(error) from error

    def _rounds(self, command: Command[tuple[int, bool]]) -> int:
        total = 0
        for _ in range(MOST_ROUNDS):
            count, more = self._runner.run(command)
            total += count
            if not more:
                break
        return total

    def _reap(self, buried: str = "", how: str = "") -> ReapReport:
        reports: list[ReapReport] = []
        for _ in range(MOST_ROUNDS):
            report, more = self._runner.run(commands.reap(self._settings, buried, how))
            reports.append(report)
            if not more:
                break
        return ReapReport(
            requeued=sum(each.requeued for each in reports),
            ended=sum(each.ended for each in reports),
            dead=tuple(job_id for each in reports for job_id in each.dead),
            workers=tuple(name for each in reports for name in each.workers),
        )
