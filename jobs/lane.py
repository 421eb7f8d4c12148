"""Groups what many callers want at the same time into one pipeline. Knows no job."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis

from core.errors import HeadraceError
from jobs.runner import AsyncRunner
from jobs.scripting import Command

T = TypeVar("T")
MOST = 128  #: commands in one pipeline


class Lane:
    """One pipeline at a time; who comes while it is under way shares the next."""

    def __init__(
        self, runner: AsyncRunner, tail: Sequence[Any] = (), check: Callable[[Any], None] | None = None
    ) -> None:
        """Take a runner; ``tail`` is a bare Redis command that ends each pipeline, and ``check`` judges its answer."""
        self._runner = runner
        self._tail = tail
        self._check = check
        self._waiting: deque[tuple[Command[Any], asyncio.Future[Any]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def run(self, command: Command[T]) -> T:
        """Run a command with whatever else is there.

        Raises:
            StoreError: the pipeline's fault; and what ``check`` or the command's own decoding raises.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return command.decode(await future)

    async def close(self) -> None:
        """Finish what is under way."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _drain(self) -> None:
        while self._waiting:
            group = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
            group = [(command, future) for command, future in group if not future.done()]  # the caller may have gone
            if group:
                await self._flush(group)

    async def _flush(self, group: Sequence[tuple[Command[Any], asyncio.Future[Any]]]) -> None:
        answers: Sequence[Any]
        try:
            answers = await self._runner.answers([command for command, _ in group], self._tail)
            if self._check is not None:
                self._check(answers[-1])
        except (HeadraceError, redis.RedisError) as error:
            _tell(group, [error] * len(group))
        else:
            _tell(group, answers)
        finally:
            for _, future in group:
                future.cancel()  # no effect on those that were told; nobody waits for ever for a bug of ours


def _tell(group: Sequence[tuple[Command[Any], asyncio.Future[Any]]], answers: Sequence[Any]) -> None:
    for (_, future), answer in zip(group, answers, strict=False):
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
