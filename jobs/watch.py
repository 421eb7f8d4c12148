"""Hears of many jobs over one connection: what comes into their logs, and their ends. Knows no state and no script.

One ``XREAD BLOCK`` waits on every followed log, on the stream of ends, and on one of our own, which wakes it when a log
is to be added. Whoever waits for an end reads no log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import redis
import redis.asyncio

from jobs import keys
from jobs.logs import read_event
from jobs.reports import LoggedEvent

log = logging.getLogger("headrace.jobs.watch")

BLOCK_MS = 1_000
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


class Watcher:
    """Hands each new event of a followed log to everyone who follows it, and tells of an end whoever waits for it."""

    def __init__(self, blocking: redis.asyncio.Redis, client: redis.asyncio.Redis) -> None:
        """Take a client of its own to block on, and one to wake it with."""
        self._blocking = blocking
        self._client = client
        self._followed: dict[bytes, Followed] = {}
        self._awaited: dict[bytes, set[asyncio.Event]] = {}  #: by job id
        self._wake_key = f"{keys.WATCHERS}{uuid.uuid4().hex}".encode()
        self._wake_id = b"0-0"
        self._ended_id = b"0-0"  #: of the last end read; those of the time in which nobody waited are read first
        self._lately: dict[bytes, None] = {}  #: the last ids read there, in order
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
    def awaiting(self, job_id: str) -> Iterator[asyncio.Event]:
        """Set when the job ends, or has ended lately, be it in an earlier run: who saw it unfinished a moment ago need
        not look again before that. Clear it before each look, and look now and then: stock RQ tells nobody here."""
        key, ended = job_id.encode(), asyncio.Event()
        if key in self._lately:
            ended.set()
        self._awaited.setdefault(key, set()).add(ended)
        self._start()
        try:
            yield ended
        finally:
            self._awaited[key].discard(ended)
            if not self._awaited[key]:
                del self._awaited[key]

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._blocking.aclose()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._followed or self._awaited:
            try:
                await self._read()
            except (redis.RedisError, OSError) as error:
                log.warning("following %d logs failed, trying again: %s", len(self._followed), error)
                await asyncio.sleep(PAUSE_SECONDS)

    async def _read(self) -> None:
        streams = {self._wake_key: self._wake_id, ENDED_KEY: self._ended_id}
        streams |= {key: followed.last for key, followed in self._followed.items()}
        words = ["XREAD", "COUNT", 1000, "BLOCK", BLOCK_MS, "STREAMS"]
        answer = await self._blocking.execute_command(*words, *streams, *streams.values(), NEVER_DECODE=True)
        for key, entries in answer or ():
            if key == self._wake_key:
                self._wake_id = entries[-1][0]
            elif key == ENDED_KEY:
                self._ended_id = entries[-1][0]
                self._tell_ends(entries)
            else:
                self._hand_out(key, entries)

    def _tell_ends(self, entries: Entries) -> None:
        for job_id in (fields[b"j"] for _, fields in entries):
            self._lately.pop(job_id, None)
            self._lately[job_id] = None
            for ended in self._awaited.get(job_id, ()):
                ended.set()
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
        with contextlib.suppress(redis.RedisError, OSError):  # it looks again within BLOCK_MS anyway
            async with self._client.pipeline(transaction=False) as pipeline:
                pipeline.xadd(self._wake_key, {"w": 1}, maxlen=1, approximate=False)
                pipeline.expire(self._wake_key, WAKE_SECONDS)
                await pipeline.execute()
