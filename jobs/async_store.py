"""The door to Redis for the API: one event loop, many callers at once, few pipelines."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

import redis
import redis.asyncio

from core.card import ModelCard
from core.errors import StoreUnavailable
from core.request import Kind
from jobs import commands
from jobs.connection import connect_async, explain, judge
from jobs.dead_letters import DeadLetters
from jobs.durable import WAITS, check_on_disk
from jobs.ends import Ends
from jobs.job import FINAL, Job, JobState, NewJob
from jobs.lane import Lane
from jobs.line import Line
from jobs.memory import MEMORY_SECONDS, MemoryReport, read_memory
from jobs.pulse import Pulse
from jobs.remembered import Remembered
from jobs.reports import LoggedEvent, QueueReport, ServerReport, Submitted, WorkerCard
from jobs.rows import Row, read_told
from jobs.runner import AsyncRunner
from jobs.scripting import Command
from jobs.settings import StoreSettings
from jobs.watch import LOOK_SECONDS, Inbox, Watcher

#: ``list`` is the name of an operation below.
Jobs: TypeAlias = list[Job]
Events: TypeAlias = list[LoggedEvent]
Workers: TypeAlias = list[WorkerCard]
Models: TypeAlias = list[ModelCard]
T = TypeVar("T")
P = ParamSpec("P")

PATIENCE_SECONDS = 5.0  #: a stream outlasts a server that is away for so long
PAUSE_SECONDS = 0.1  #: between two tries of it
PART = 1_000  #: jobs that one question names


class AsyncStore:
    """The operations the API needs, as ``Store`` has them.

    Each may raise StoreUnavailable: at once while the server does not answer (``jobs.pulse``), and within a second of
    when it stopped to.
    """

    def __init__(self, settings: StoreSettings) -> None:
        """Take ``settings.redis_url``; nothing is sent yet."""
        url, keep = settings.redis_url, settings.result_ttl_seconds
        self._settings = settings
        self._pulse = Pulse(connect_async(url))
        self._runner = AsyncRunner(connect_async(url), keep, self._pulse)
        # Its own: WAITAOF waits for this connection's writes.
        self._submitting = AsyncRunner(connect_async(url), keep, self._pulse)
        wait = WAITS[settings.durability]
        self._submits = Lane(self._submitting, wait, functools.partial(check_on_disk, wait) if wait else None)
        self._reads = Lane(self._runner)
        self._memory = Remembered(self._look_at_memory, MEMORY_SECONDS, time.monotonic)
        self.dead = DeadLetters(self._runner)
        self._watcher = Watcher(Line(connect_async(url)), self._runner)
        self._ends = Ends(connect_async(url), self._over)

    @classmethod
    def connect(cls, settings: StoreSettings) -> AsyncStore:
        return cls(settings)

    async def close(self) -> None:
        """End every watch and every connection."""
        await self._watcher.close()
        await self._ends.close()
        await self._submits.close()
        await self._reads.close()
        await self._submitting.close()
        await self._runner.close()
        await self._pulse.close()

    async def check(self) -> None:
        """Raise StoreUnavailable when the server does not answer."""
        await self._runner.run(Command("PING", [], bool))

    async def inspect(self) -> ServerReport:
        """Look at the server. Raises UnsafeServer: it cannot keep ``settings.durability``."""
        try:
            async with self._pulse.beating():
                info: dict[str, Any] = await self._runner.client.info()
                return judge(info, await self._fsync(), self._settings)
        except (redis.RedisError, OSError) as error:
            raise explain(error) from error

    async def submit(self, job: NewJob) -> Submitted:
        """Create a job, or find the one that has its id; with any durability but "memory" it is on disk then.

        Raises:
            QueueFull, StoreFull, DeadlineUnreachable; NotDurable: it is there, but the disk has not confirmed it: a
                repeat with the same id is safe.
        """
        return await self._submits.run(commands.submit(job, self._settings, await self.memory()))

    async def memory(self) -> MemoryReport:
        """The server's memory, as it was at most a second ago."""
        return await self._memory.get()

    async def get(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        return (await self._row(job_id)).job

    async def list(
        self,
        *,
        states: Collection[JobState] = (),
        kinds: Collection[Kind] = (),
        after: str | None = None,
        limit: int = 20,
    ) -> Jobs:
        """Jobs, newest first, of these states and kinds (all where none is given), behind the job ``after``.

        Raises:
            JobNotFound: ``after`` is unknown.
        """
        command = commands.page(states, kinds, after, limit)
        jobs, stale = await self._runner.run(command)
        while stale:
            await self._runner.run(commands.reindex(stale))
            jobs, stale = await self._runner.run(command)
        return jobs

    async def cancel(self, job_id: str) -> Job:
        """End a queued job; ask the worker of a running one to. Raises JobNotFound; JobConflict when it has ended."""
        return await self._reads.run(commands.cancel(job_id))

    async def retry(self, job_id: str) -> Job:
        """Queue a failed job again, from its beginning. Raises JobNotFound, JobConflict."""
        return await self._reads.run(commands.retry(job_id))

    async def resend(self, job_id: str) -> Job:
        """Deliver an ended job's callback anew. Raises JobNotFound; JobConflict when there is none."""
        return await self._reads.run(commands.resend(job_id))

    async def delete(self, job_id: str) -> None:
        """Forget an ended job. Raises JobNotFound; JobConflict when it has not ended."""
        await self._reads.run(commands.delete(job_id))

    async def events(self, job_id: str, after: int = -1) -> Events:
        """The log behind event ``after``; empty for an unknown job."""
        return await self._reads.run(commands.events(job_id, after))

    async def workers(self) -> Workers:
        """Those with a live lease."""
        return await self._reads.run(commands.workers())

    async def models(self) -> Models:
        """Of live workers, one a name."""
        return [*{card.model.name: card.model for card in await self.workers() if card.model}.values()]

    async def known(self) -> Models:
        """Of all workers there ever were, one a name."""
        return await self._reads.run(commands.known_models())

    async def queue(self) -> QueueReport:
        """Counts and speed."""
        return await self._reads.run(commands.queue())

    async def watch(self, job_id: str, after: int = -1) -> AsyncGenerator[Events, None]:
        """The log behind event ``after`` as it grows, in order, none twice; ends with the job.

        A job that stock RQ ended may end without a ``finished`` event.

        Raises:
            JobNotFound: unknown, or forgotten meanwhile.
        """
        with self._watcher.follow(job_id, after) as inbox:
            row = await _outlast(self._row, job_id)
            last = after
            events = await _outlast(self._follow, job_id, last)
            shown = after < 0 and _is_first_attempt_without_tokens(events)
            while True:
                if not shown and any(event.type == "token" for event in events):
                    events, shown = await _outlast(self._show, job_id, last), True
                if events:
                    last = events[-1].number
                    yield events
                    if events[-1].type == "finished":
                        return
                if row.job.state in FINAL and last + 1 >= row.events:
                    return
                events = await _outlast(self._next, inbox, job_id, last)
                if not events:
                    row = await _outlast(self._row, job_id)
                    events = await _outlast(self.events, job_id, last)

    async def wait(self, job_id: str, timeout_seconds: float, *, seen: Job | None = None) -> Job:
        """The job, once it has ended or the time is over.

        Args:
            seen: the job as the caller saw it unfinished a moment ago: there is no need to look at once.

        Raises:
            JobNotFound
        """
        if timeout_seconds <= 0:
            return await self.get(job_id)
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_seconds
        with self._ends.awaiting(job_id) as ended:
            if seen is None:
                ended.heard.set()
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await ended.heard.wait()
                ended.heard.clear()
                told = read_told(ended.told)
                if told and seen and told.job.attempt > seen.attempt:  # else it is of an earlier run
                    return told.job
                job = await self.get(job_id)
                if job.state in FINAL or clock() >= deadline:
                    return job

    async def _look_at_memory(self) -> MemoryReport:
        try:
            async with self._pulse.beating():
                return read_memory(await self._runner.client.info("memory"))
        except (redis.RedisError, OSError) as error:
            raise explain(error) from error

    async def _over(self, job_ids: Sequence[str]) -> Collection[str]:
        """Those of the jobs that have ended, or are unknown."""
        parts = [job_ids[i : i + PART] for i in range(0, len(job_ids), PART)]
        return [job_id for part in parts for job_id in await self._reads.run(commands.over(part))]

    async def _row(self, job_id: str) -> Row:
        row = await self._reads.run(commands.get(job_id))
        if row.stale:
            await self._runner.run(commands.reindex([job_id]))
            row = await self._reads.run(commands.get(job_id))
        return row

    async def _follow(self, job_id: str, after: int) -> Events:
        """The log behind event ``after`` for a reader who stays: from now on what comes is published promptly."""
        return await self._reads.run(commands.follow(job_id, after))

    async def _show(self, job_id: str, after: int) -> Events:
        """The log behind event ``after`` for a reader outside: from now on the answer is not started over."""
        return await self._reads.run(commands.show(job_id, after))

    async def _next(self, inbox: Inbox, job_id: str, last: int) -> Events:
        """The events behind ``last`` that come within LOOK_SECONDS."""
        try:
            told = await asyncio.wait_for(inbox.get(), LOOK_SECONDS)
        except TimeoutError:
            return []
        while not inbox.empty():
            told = told + inbox.get_nowait()
        events = [event for event in told if event.number > last]
        # A hole: another follower was ahead of us when we joined, or the log was packed before all of it was read here.
        if events and events[-1].number - last != len(events):
            return await self.events(job_id, last)
        return events

    async def _fsync(self) -> str:
        try:
            found: Any = await self._runner.client.config_get("appendfsync")
        except redis.exceptions.NoPermissionError:
            return "unknown"
        return str(found.get("appendfsync", "unknown"))


def _is_first_attempt_without_tokens(events: Events) -> bool:
    """Of a log from its beginning. Tokens that come then counted as read when they were published: none starts over."""
    return [event.type for event in events] in ([], ["started"])


async def _outlast(read: Callable[P, Awaitable[T]], *args: P.args, **more: P.kwargs) -> T:
    """Read again while the server is away for a moment: a restart of it ends no stream."""
    clock = asyncio.get_running_loop().time
    until = clock() + PATIENCE_SECONDS
    while True:
        try:
            return await read(*args, **more)
        except StoreUnavailable:
            if clock() > until:
                raise
            await asyncio.sleep(PAUSE_SECONDS)
