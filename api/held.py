"""Requests that stay open, waits and streams: how many there may be, and how they end when the server stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import TypeVar

from api.errors import TooManyStreams

T = TypeVar("T")


class Held:
    """Counts held requests and wakes all of them at the end.

    Invariant: ``0 <= count <= limit``.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self._closing = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    @property
    def full(self) -> bool:
        return self.count >= self.limit

    def close(self) -> None:
        """Let go of every held request; call it on the event loop."""
        self._closing.set()
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time())

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Count one held request.

        Raises:
            TooManyStreams: there is no place left.
        """
        if self.full:
            raise TooManyStreams(self.limit)
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    @contextlib.asynccontextmanager
    async def until_closed(self) -> AsyncIterator[None]:
        """What happens inside ends, without an error, when the server does."""
        limit = asyncio.timeout(0 if self.closing else None)
        try:
            async with limit:
                self._limits.add(limit)
                yield
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            self._limits.discard(limit)

    async def first(self, awaited: Awaitable[T], seconds: float) -> asyncio.Future[T]:
        """Wait for ``awaited``, for ``seconds`` or for the server's end, whichever comes first.

        Returns:
            The future of ``awaited``; not done when something else came first, and the caller's to cancel.
        """
        future = asyncio.ensure_future(awaited)
        ending = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({future, ending}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            future.cancel()
            raise
        finally:
            ending.cancel()
        return future
