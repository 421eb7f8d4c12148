"""Whether the server answers just now, so that a call on one that hangs fails at once. Knows no job and no script."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import redis
import redis.asyncio
from redis.exceptions import AuthenticationError

from core.errors import StoreUnavailable
from jobs.connection import REPLY_SECONDS
from jobs.line import Line

log = logging.getLogger("headrace.jobs.pulse")

PAUSE_SECONDS = 0.25  #: between two pings, and before the first: most calls have their answer by then
SILENCE_SECONDS = 0.5  #: a server that answers no ping for so long is away
SILENT = f"no answer within {SILENCE_SECONDS:g} s"


class Pulse:
    """Pings on a connection of its own while a call waits for its answer or the server is away; while no ping comes
    back, what is ``beating`` fails at once.

    Together the constants above keep "away" known in less than a second, and "back" in less than that.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        """Take a client; nothing is sent before a call takes its time."""
        self._line = Line(client)
        self._task: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None  #: begins to ping, unless all calls are answered before
        self._calls: set[asyncio.Timeout] = set()
        self._lost: str | None = None  #: what is wrong; None while the server answers

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """What happens inside ends when the pulse is lost, or after REPLY_SECONDS.

        Raises:
            StoreUnavailable: it is lost, or was lost on the way: what was sent may have been done.
        """
        if self._lost is not None:
            raise StoreUnavailable(self._lost)
        limit = asyncio.timeout(REPLY_SECONDS)
        try:
            async with limit:
                self._calls.add(limit)
                if self._alarm is None:
                    self._alarm = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._start)
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise StoreUnavailable(self._lost or f"no answer within {REPLY_SECONDS:g} s") from error
        finally:
            self._calls.discard(limit)
            if not self._calls and self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._line.close()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._calls or self._lost is not None:
            problem = await self._look()
            if problem not in (None, SILENT):  # a cut connection says nothing about the server; a fresh one does
                problem = await self._look()
            self._note(problem)
            await asyncio.sleep(PAUSE_SECONDS)

    def _note(self, problem: str | None) -> None:
        if (problem is None) != (self._lost is None):
            log.warning("the job store is away: %s", problem) if problem else log.warning("the job store is back")
        self._lost = problem
        if problem is not None:
            for limit in self._calls:
                limit.reschedule(asyncio.get_running_loop().time())

    async def _look(self) -> str | None:
        """What is wrong with the server; None when it answers, be it with a refusal that callers will hear, too."""
        ping = asyncio.ensure_future(self._line.ask([("PING",)]))
        try:
            await asyncio.wait({ping}, timeout=SILENCE_SECONDS)
            if not ping.done():
                return SILENT
            ping.result()
        except AuthenticationError:
            return None
        except (redis.RedisError, OSError) as error:
            return str(error) or type(error).__name__
        finally:
            ping.cancel()
            await asyncio.wait({ping})
        return None
