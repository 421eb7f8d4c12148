"""Hears over one connection what comes into many jobs' logs. Knows no state and no script.

One ``XREAD BLOCK`` waits on every followed log, and on a stream of our own, which wakes it when a log is to be added.
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
WAKE_SECONDS = 60  #: an unused wake stream is forgotten after so long

Inbox = asyncio.Queue[list[LoggedEvent]]
Entries: TypeAlias = Sequence[tuple[bytes, dict[bytes, bytes]]]


@dataclass(slots=True, eq=False)
class Followed:
    """One log, and who follows it."""

    last: bytes  #: id of the last entry handed out
    inboxes: set[Inbox] = field(default_factory=set)


class Watcher:
    """Hands each new event of a followed log to everyone who follows it."""

    def __init__(self, line: Line, runner: AsyncRunner) -> None:
        """Take a line of its own to block on, and a runner to wake it with."""
        self._line = line
        self._runner = runner
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
        await self._line.close()

    async def _run(self) -> None:
        while self._followed:
            try:
                await self._read()
            except (redis.RedisError, OSError) as error:
                said = str(error) or "no answer"
                log.warning("following %d logs failed, trying again: %s", len(self._followed), said)
                await asyncio.sleep(PAUSE_SECONDS)

    async def _read(self) -> None:
        streams = {self._wake_key: self._wake_id, **{key: each.last for key, each in self._followed.items()}}
        words = ["XREAD", "COUNT", 1000, "BLOCK", round(LOOK_SECONDS * 1000), "STREAMS", *streams, *streams.values()]
        async with asyncio.timeout(LOOK_SECONDS + SILENCE_SECONDS):
            [answer] = await self._line.ask([words])
        if isinstance(answer, redis.ResponseError):
            raise answer
        for key, raw in answer or ():
            entries = [(entry_id, dict(zip(fields[::2], fields[1::2], strict=True))) for entry_id, fields in raw]
            if key == self._wake_key:
                self._wake_id = entries[-1][0]
            else:
                self._hand_out(key, entries)

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
