"""Hears of many jobs over one connection: what comes into their logs, and their ends. Knows no state and no script.

One ``XREAD BLOCK`` waits on every followed log, on the stream of ends, and on one of our own, which wakes it when a log
is to be added. Whoever waits for an end reads no log; once a second one question asks which of those jobs are over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import redis

from core.errors import StoreError
from jobs import keys
from jobs.line import Line
from jobs.logs import read_event
from jobs.reports import LoggedEvent
from jobs.runner import AsyncRunner
from jobs.scripting import Command

log = logging.getLogger("headrace.jobs.watch")

LOOK_SECONDS = 1.0  #: a silent job is looked at so often: stock RQ may have ended it, and told nobody
SILENCE_SECONDS = 1.5  #: a server that says nothing for so long after that is not waited for
PAUSE_SECONDS = 0.2  #: after a fault
ENDS = 1_000  #: so many are remembered, as many as the stream holds
WAKE_SECONDS = 60  #: an unused wake stream is forgotten after so long
ENDED_KEY = keys.ENDED.encode()

Inbox = asyncio.Queue[list[LoggedEvent]]
Entries: TypeAlias = Sequence[tuple[bytes, dict[bytes, bytes]]]


@dataclass(slots=True, eq=False)
class Followed:
    """One log, and who follows it."""

    last: bytes  #: id of the last entry handed out
    inboxes: set[Inbox] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Awaited:
    """An end that somebody waits for."""

    heard: asyncio.Event = field(default_factory=asyncio.Event)
    told: Mapping[bytes, bytes] = field(default_factory=dict)  #: what the stream of ends told with it


class Watcher:
    """Hands each new event of a followed log to everyone who follows it, and tells of an end whoever waits for it."""

    def __init__(
        self, line: Line, runner: AsyncRunner, over: Callable[[Sequence[str]], Awaitable[Collection[str]]]
    ) -> None:
        """Take a line of its own to block on, a runner to wake it with, and who knows which of some jobs are over."""
        self._line = line
        self._runner = runner
        self._over = over
        self._followed: dict[bytes, Followed] = {}
        self._awaited: dict[str, set[Awaited]] = {}  #: by job id
        self._wake_key = f"{keys.WATCHERS}{uuid.uuid4().hex}".encode()
        self._wake_id = b"0-0"
        self._ended_id = b"0-0"  #: of the last end read; those of the time in which nobody waited are read first
        self._lately: dict[str, None] = {}  #: the last ids read there, in order
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def follow(self, job_id: str, after: int) -> Iterator[Inbox]:
        """An inbox that gets events behind ``after``, or only newer ones where somebody follows already: look into the
        log once after this, and expect to be told things twice."""
        key = f"{keys.EVENTS}{job_id}".encode()
        followed = self._followed.get(key)
        if followed is None:
            followed = self._followed[key] = Followed(f"{after + 1}-0".encode())
        inbox: Inbox = asyncio.Queue()
        followed.inboxes.add(inbox)
        self._start()
        waker = asyncio.create_task(self._wake())
        try:
            yield inbox
        finally:
            waker.cancel()
            followed.inboxes.discard(inbox)
            if not followed.inboxes and self._followed.get(key) is followed:
                del self._followed[key]

    @contextlib.contextmanager
    def awaiting(self, job_id: str) -> Iterator[Awaited]:
        """``heard`` when the job may have ended, be it lately or in an earlier run, or when nobody can say: who saw it
        unfinished a moment ago need not look again before that. Clear it before each look."""
        ended = Awaited()
        if job_id in self._lately:
            ended.heard.set()
        self._awaited.setdefault(job_id, set()).add(ended)
        self._start()
        try:
            yield ended
        finally:
            self._awaited[job_id].discard(ended)
            if not self._awaited[job_id]:
                del self._awaited[job_id]

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._line.close()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        look_at = clock() + LOOK_SECONDS
        while self._followed or self._awaited:
            try:
                await self._read(look_at - clock())
            except (redis.RedisError, OSError) as error:
                said = str(error) or "no answer"
                log.warning("following %d logs failed, trying again: %s", len(self._followed), said)
                await asyncio.sleep(PAUSE_SECONDS)
            if clock() >= look_at:
                look_at = clock() + LOOK_SECONDS
                await self._look()

    async def _look(self) -> None:
        """Ask for all who wait; where that fails each of them asks, and hears why."""
        over: Collection[str] = [*self._awaited]
        with contextlib.suppress(StoreError):
            over = await self._over([*self._awaited])
        for job_id in over:
            self._tell(job_id, {})

    def _tell(self, job_id: str, told: Mapping[bytes, bytes]) -> None:
        for ended in self._awaited.get(job_id, ()):
            ended.told = told
            ended.heard.set()

    async def _read(self, seconds: float) -> None:
        streams = {self._wake_key: self._wake_id, ENDED_KEY: self._ended_id}
        streams |= {key: followed.last for key, followed in self._followed.items()}
        block = max(1, round(seconds * 1000))
        words = ["XREAD", "COUNT", 1000, "BLOCK", block, "STREAMS", *streams, *streams.values()]
        async with asyncio.timeout(seconds + SILENCE_SECONDS):
            [answer] = await self._line.ask([words])
        if isinstance(answer, redis.ResponseError):
            raise answer
        for key, raw in answer or ():
            entries = [(entry_id, dict(zip(fields[::2], fields[1::2], strict=True))) for entry_id, fields in raw]
            if key == self._wake_key:
                self._wake_id = entries[-1][0]
            elif key == ENDED_KEY:
                self._ended_id = entries[-1][0]
                self._tell_ends(entries)
            else:
                self._hand_out(key, entries)

    def _tell_ends(self, entries: Entries) -> None:
        for _, told in entries:
            job_id = told[b"j"].decode()
            self._lately.pop(job_id, None)
            self._lately[job_id] = None
            self._tell(job_id, told)
        while len(self._lately) > ENDS:
            del self._lately[next(iter(self._lately))]

    def _hand_out(self, key: bytes, entries: Entries) -> None:
        followed = self._followed.get(key)
        if followed is None:
            return
        followed.last = entries[-1][0]
        events = [read_event(entry_id, fields) for entry_id, fields in entries]
        for inbox in followed.inboxes:
            inbox.put_nowait(events)

    async def _wake(self) -> None:
        add = Command("XADD", [self._wake_key, "MAXLEN", 1, "*", "w", 1], bool)
        with contextlib.suppress(StoreError):  # it looks again within LOOK_SECONDS anyway
            await self._runner.answers([add, Command("EXPIRE", [self._wake_key, WAKE_SECONDS], bool)])
