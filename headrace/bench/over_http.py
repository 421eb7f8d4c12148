"""Drives a load through a server, streaming every answer. Knows HTTP through the client only."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from headrace.async_client import AsyncClient
from headrace.bench.load import Load
from headrace.bench.samples import Sample
from headrace.calls import new_job_id
from headrace.errors import ClientError, ServerRefused
from headrace.patience import Patience

CLIENT_PLACES = 200  #: requests at once through one client, which has somewhat more connections
MOST_AT_ONCE = 800  #: of an open loop; what is due beyond waits here, and its clock runs
NO_PATIENCE = Patience(broken_tries=0, busy_seconds=0)  #: what the server refuses is what we came to count


async def drive(url: str, api_key: str, load: Load, progress: Callable[[], None]) -> list[Sample]:
    """Send everything, wait for every end; samples in the order in which they were due.

    Args:
        progress: called at each end.
    """
    async with _places(url, api_key, load.concurrency or MOST_AT_ONCE) as places:
        return await Drive(load, places, progress).run()


class Drive:
    """One run."""

    def __init__(self, load: Load, places: asyncio.Queue[AsyncClient], progress: Callable[[], None]) -> None:
        self._load = load
        self._places = places
        self._progress = progress
        self._samples: dict[int, Sample] = {}
        self._next = 0
        self._start = time.perf_counter()

    async def run(self) -> list[Sample]:
        if self._load.concurrency is not None:
            callers = (self._call_again() for _ in range(self._load.concurrency))
            await asyncio.gather(*callers)
        else:
            await self._send_when_due(self._load.due or ())
        return [self._samples[number] for number in sorted(self._samples)]

    async def _call_again(self) -> None:
        while self._next < self._load.requests and self._now() < self._load.seconds:
            number, self._next = self._next, self._next + 1
            await self._one(number, self._now())

    async def _send_when_due(self, due: Sequence[float]) -> None:
        async with asyncio.TaskGroup() as group:
            for number, moment in enumerate(due):
                await asyncio.sleep(max(0.0, moment - self._now()))
                group.create_task(self._one(number, moment))

    async def _one(self, number: int, due: float) -> None:
        client = await self._places.get()
        try:
            self._samples[number] = await self._ask(client, self._load.body(number), due)
        finally:
            self._places.put_nowait(client)
        self._progress()

    async def _ask(self, client: AsyncClient, body: Mapping[str, Any], due: float) -> Sample:
        deliveries: list[tuple[float, int]] = []
        error: str | None = "stream_ended"
        prompt_tokens = 0
        try:
            job = await client.submit(body, job_id=new_job_id())
            async for event in client.events(job.id):
                if event.type == "token":
                    deliveries.append((self._now(), len(event.fields.get("token_ids") or ())))
                if event.job is not None:
                    prompt_tokens = int(event.job.usage.get("prompt_tokens", 0))
                    failure = event.job.error or {}
                    error = None if event.job.succeeded else str(failure.get("code") or event.job.status)
        except ServerRefused as refusal:
            error = refusal.code
        except ClientError as failed:
            error = type(failed).__name__.lower()
        return Sample(
            due=due, ended=self._now(), prompt_tokens=prompt_tokens, deliveries=tuple(deliveries), error=error
        )

    def _now(self) -> float:
        return time.perf_counter() - self._start


@contextlib.asynccontextmanager
async def _places(url: str, api_key: str, count: int) -> AsyncIterator[asyncio.Queue[AsyncClient]]:
    """A client for each of ``count`` requests at once; the first ones are used first."""
    async with contextlib.AsyncExitStack() as stack:
        places: asyncio.Queue[AsyncClient] = asyncio.LifoQueue()
        for first in range(0, count, CLIENT_PLACES):
            client = await stack.enter_async_context(AsyncClient(url, api_key=api_key, patience=NO_PATIENCE))
            for _ in range(min(CLIENT_PLACES, count - first)):
                places.put_nowait(client)
        yield places
