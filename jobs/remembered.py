"""A value that is loaded again when it is too old. Knows nothing of what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """A value that is loaded again when it is older than ``seconds``; whoever asks meanwhile shares the one load."""

    def __init__(self, load: Callable[[], Coroutine[Any, Any, T]], seconds: float, clock: Callable[[], float]) -> None:
        self._load = load
        self._seconds = seconds
        self._clock = clock
        self._kept: tuple[float, T] | None = None  #: when it was loaded, and what
        self._loading: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """The value; an error of the load is everybody's who waited for it, and is not remembered."""
        if self._kept is not None and self._clock() - self._kept[0] < self._seconds:
            return self._kept[1]
        if self._loading is None:
            self._loading = asyncio.ensure_future(self._load())
            self._loading.add_done_callback(self._loaded)
        return await asyncio.shield(self._loading)

    def _loaded(self, task: asyncio.Task[T]) -> None:
        self._loading = None
        if not task.cancelled() and task.exception() is None:
            self._kept = (self._clock(), task.result())
