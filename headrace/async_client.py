"""The Python client for asyncio: what ``headrace.client`` does, awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, TypeVar

import httpx2

from headrace import calls
from headrace.answers import Event, Job, JobPage
from headrace.calls import DEFAULT_URL, Asked, Call
from headrace.errors import JobFailed, TimedOut, Unreachable
from headrace.patience import NOTHING_LEFT, Patience, Tries
from headrace.transport import answer, options, request, stream, this_wait, why

T = TypeVar("T")


class AsyncClient:
    """The client for asyncio; use it as an async context manager.

    Raises (every method): Unreachable, or a ServerRefused with ``status``, ``code``, ``param``.
    """

    def __init__(self, url: str = DEFAULT_URL, *, api_key: str = "", patience: Patience | None = None) -> None:
        self._url = url.rstrip("/")
        self._patience = patience or Patience()
        self._http = httpx2.AsyncClient(**options(self._url, api_key))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def submit(
        self, asked: Asked, *, job_id: str | None = None, wait: float = 0, priority: int | None = None, **params: Any
    ) -> Job:
        """Queue a job; the answer is on disk when this returns.

        Args:
            asked: a prompt, messages, or a whole body ``{"kind", "input", "params", "metadata", …}``.
            job_id: your own id; submitting twice with one id makes one job.
            wait: seconds to wait for its end before it is returned as it is then.
            priority: -100 to 100, the lower the earlier; 0 where none is given.
            params: sampling parameters: ``max_tokens``, ``n``, ``temperature``, ``seed``, ``stop`` …
        """
        body = calls.body_of(asked, priority=priority, **params)
        return await self._send(calls.submit(job_id or calls.new_job_id(), body, wait))

    async def get(self, job_id: str) -> Job:
        """The job as it is now."""
        return await self._send(calls.get(job_id))

    async def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job once it has ended.

        Raises:
            TimedOut: it has not within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (job := await self._send(calls.get(job_id, this_wait(deadline)))).ended:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(job_id, timeout or 0)
        return job

    async def run(self, asked: Asked, *, timeout: float | None = None, **params: Any) -> Job:
        """Submit and wait.

        Raises:
            TimedOut: it has not ended in time.
            JobFailed: it ended without a result.
        """
        job = await self.wait((await self.submit(asked, **params)).id, timeout)
        if not job.succeeded:
            raise JobFailed(job)
        return job

    async def events(self, job_id: str, after: int = -1) -> AsyncIterator[Event]:
        """Every event numbered above ``after``, as they come, each once, until the last.

        A connection that breaks is opened again and goes on after the last event that was read.
        """
        tries = Tries(self._patience)
        while True:
            try:
                async for event in self._read_events(job_id, after, tries):
                    after = event.number
                    tries.broken = 0
                    yield event
                    if event.type == "finished":
                        return
            except httpx2.TransportError as error:
                await self._pause(tries.pause_after_break(), error)
            else:
                if tries.over:
                    return
                await self._pause(tries.pause_after_break(), None)

    async def stream(self, job_id: str, index: int = 0) -> AsyncIterator[str]:
        """The text of one choice, piece by piece, until the whole job has ended.

        Raises:
            JobFailed: it ended without a result.
        """
        async for event in self.events(job_id):
            if event.text and event.index == index:
                yield event.text
            if event.job is not None and not event.job.succeeded:
                raise JobFailed(event.job)

    async def cancel(self, job_id: str) -> Job:
        """Ask for its end; a running job keeps what it has."""
        return await self._send(calls.cancel(job_id))

    async def retry(self, job_id: str) -> Job:
        """Queue a failed job again."""
        return await self._send(calls.retry(job_id))

    async def resend(self, job_id: str) -> Job:
        """Tell an ended job's webhook of its end again."""
        return await self._send(calls.resend(job_id))

    async def delete(self, job_id: str) -> None:
        """Forget an ended job and its answer."""
        await self._send(calls.delete(job_id))

    async def list(
        self, *, status: str | None = None, kind: str | None = None, after: str | None = None, limit: int = 20
    ) -> JobPage:
        """A page of jobs, newest first."""
        return await self._send(calls.jobs(status=status, kind=kind, after=after, limit=limit))

    async def dead_letters(self, *, after: str | None = None, limit: int = 20) -> JobPage:
        """A page of the jobs that were running each time their worker died, the last to die first."""
        return await self._send(calls.dead_letters(after=after, limit=limit))

    async def retry_dead_letters(self, ids: Sequence[str] | None = None) -> Mapping[str, Any]:
        """Queue these dead letters, or all, again; which were, which ``skipped``, and whether it ``has_more``."""
        return await self._send(calls.retry_dead_letters(ids))

    async def purge_dead_letters(self) -> Mapping[str, Any]:
        """Forget all dead letters; how many were ``deleted``, and whether it ``has_more``."""
        return await self._send(calls.purge_dead_letters())

    async def models(self) -> Sequence[Mapping[str, Any]]:
        """What is served."""
        return await self._send(calls.models())

    async def workers(self) -> Sequence[Mapping[str, Any]]:
        """Who serves it."""
        return await self._send(calls.workers())

    async def ready(self) -> Mapping[str, Any]:
        """Whether the server can take jobs, and what it promises about them."""
        return await self._send(calls.ready())

    async def _send(self, call: Call[T]) -> T:
        tries = Tries(self._patience)
        while True:
            try:
                response = await self._http.request(**request(call))
            except httpx2.TransportError as error:
                await self._pause(tries.pause_after_break(), error)
                continue
            pause = tries.pause_after(response)
            if pause is None:
                return call.read(answer(response))
            await asyncio.sleep(pause)

    async def _read_events(self, job_id: str, after: int, tries: Tries) -> AsyncIterator[Event]:
        while True:
            async with self._http.sse(calls.events_path(job_id), **stream(after)) as source:
                tries.over = source.response.status_code == NOTHING_LEFT
                if tries.over:
                    return
                if source.response.is_success:
                    async for sent in source:
                        yield calls.read_event(sent.id, sent.event, sent.json())
                    return
                await source.response.aread()
                pause = tries.pause_after(source.response)
                if pause is None:
                    answer(source.response)
                    return
            await asyncio.sleep(pause)

    async def _pause(self, seconds: float | None, error: Exception | None) -> None:
        if seconds is None:
            raise Unreachable(self._url, why(error)) from error
        await asyncio.sleep(seconds)
