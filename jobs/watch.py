"""Follows many event logs over one connection. Knows no state and no script.

One ``XREAD BLOCK`` waits on every watched stream and on one of our own, which wakes it when a log is to be added.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import redis
import redis.asyncio

from jobs import keys
from jobs.logs import read_event
from jobs.reports import LoggedEvent

log = logging.getLogger("headrace.jobs.watch")

BLOCK_MS = 1_000
PAUSE_SECONDS = 0.2  #: after a fault
WAKE_SECONDS = 60  #: an unused wake stream is forgotten after so long

Inbox = asyncio.Queue[list[LoggedEvent]]


@dataclass(slots=True, eq=False)
class Followed:
    """One log, and who follows it."""

    last: bytes  #: id of the last entry handed out
    inboxes: set[Inbox] = field(default_factory=set)


class Watcher:
    """Hands each new event of a followed log to everyone who follows it."""

    def __init__(self, blocking: redis.asyncio.Redis, client: redis.asyncio.Redis) -> None:
        """Take a client of its own to block on, and one to wake it with."""
        self._blocking = blocking
        self._client = client
        self._followed: dict[bytes, Followed] = {}
        self._wake_key = f"{keys.WATCHERS}{uuid.uuid4().hex}".encode()
        self._wake_id = b"0-0"
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
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        waker = asyncio.create_task(self._wake())
        try:
            yield inbox
        finally:
            waker.cancel()
            followed.inboxes.discard(inbox)
            if not followed.inboxes and self._followed.get(key) is followed:
                del self._followed[key]

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._blocking.aclose()

    async def _run(self) -> None:
        while self._followed:
            try:
                await self._read()
            except (redis.RedisError, OSError) as error:
                log.warning("following %d logs failed, trying again: %s", len(self._followed), error)
                await asyncio.sleep(PAUSE_SECONDS)

    async def _read(self) -> None:
        streams = {key: followed.last for key, followed in self._followed.items()}
        words = ["XREAD", "COUNT", 1000, "BLOCK", BLOCK_MS, "STREAMS"]
        answer = await self._blocking.execute_command(
            *words, self._wake_key, *streams, self._wake_id, *streams.values(), NEVER_DECODE=True
        )
        for key, entries in answer or ():
            if key == self._wake_key:
                self._wake_id = entries[-1][0]
            else:
                self._hand_out(key, entries)

    def _hand_out(self, key: bytes, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
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
