"""Tells who waits for a job that it has ended. Reads no log, and knows no state and no script.

Whichever script ends a job publishes it on one channel, to which a process listens while somebody waits in it. Once in
LOOK_SECONDS one question asks which of the jobs waited for are over: stock RQ ends jobs, too, and tells nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import redis
import redis.asyncio

from core.errors import StoreError
from jobs import keys

log = logging.getLogger("headrace.jobs.ends")

LOOK_SECONDS = 2.0  #: between two looks at the jobs that are waited for
LINGER_LOOKS = 5  #: so many are left out before we stop to listen, because nobody waits
PAUSE_SECONDS = 0.2  #: after a fault
ENDS = 1_000  #: so many of the last are remembered: some may have ended just before somebody waits for them


@dataclass(slots=True, eq=False)
class Awaited:
    """An end that somebody waits for."""

    heard: asyncio.Event = field(default_factory=asyncio.Event)
    told: Mapping[bytes, bytes] = field(default_factory=dict)  #: what was told with it


class Ends:
    """Listens over one connection for all who wait."""

    def __init__(
        self, client: redis.asyncio.Redis, over: Callable[[Sequence[str]], Awaitable[Collection[str]]]
    ) -> None:
        """Take a client for its address, and who knows which of some jobs are over; nothing is sent yet."""
        self._pool = client.connection_pool
        self._over = over
        self._awaited: dict[str, set[Awaited]] = {}  #: by job id
        self._lately: dict[str, None] = {}  #: ids that ended last, in order
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def awaiting(self, job_id: str) -> Iterator[Awaited]:
        """``heard`` when the job may have ended, be it lately or in an earlier run, or when nobody can say: who saw it
        unfinished a moment ago need not look again before that. Clear it before each look."""
        ended = Awaited()
        if job_id in self._lately:
            ended.heard.set()
        self._awaited.setdefault(job_id, set()).add(ended)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
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

    async def _run(self) -> None:
        """Listen, and look now and then, until nobody has waited for a while."""
        listening, idle = asyncio.create_task(self._listen()), 0
        try:
            while idle < LINGER_LOOKS:
                await asyncio.sleep(LOOK_SECONDS)
                idle = 0 if self._awaited else idle + 1
                await self._look()
            self._task = None  # whoever waits from now on listens anew
        finally:
            listening.cancel()
            await asyncio.wait({listening})

    async def _listen(self) -> None:
        connection: Any = self._pool.make_connection()
        try:
            while True:
                try:
                    await self._hear_all(connection)
                except (redis.RedisError, OSError) as error:
                    log.warning("listening for the ends of jobs failed, trying again: %s", error)
                await connection.disconnect(nowait=True)
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            await connection.disconnect(nowait=True)

    async def _hear_all(self, connection: Any) -> NoReturn:
        await connection.connect()
        await connection.send_command("SUBSCRIBE", keys.ENDED)
        await connection.read_response()
        await self._look()  # at those that ended before
        while True:
            _, _, message = await connection.read_response()
            try:
                self._hear(message)
            except (ValueError, KeyError):
                log.warning("ignored what is not the end of a job: %.80r", message)

    async def _look(self) -> None:
        """Ask for all who wait; where that fails each of them asks, and hears why."""
        over: Collection[str] = [*self._awaited]
        if over:
            with contextlib.suppress(StoreError):
                over = await self._over([*self._awaited])
        for job_id in over:
            self._tell(job_id, {})

    def _hear(self, message: bytes) -> None:
        """Take what ``lib/base.lua``'s ``tell_end`` publishes."""
        head, _, body = message.partition(b"\n")
        parts, at = [], 0
        for length in map(int, head.split()):
            parts.append(body[at : at + length])
            at += length
        told = dict(zip(parts[::2], parts[1::2], strict=True))
        job_id = told[b"j"].decode()
        self._lately.pop(job_id, None)
        self._lately[job_id] = None
        if len(self._lately) > ENDS:
            del self._lately[next(iter(self._lately))]
        self._tell(job_id, told)

    def _tell(self, job_id: str, told: Mapping[bytes, bytes]) -> None:
        for ended in self._awaited.get(job_id, ()):
            ended.told = told
            ended.heard.set()
