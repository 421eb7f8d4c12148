"""A job's events as server-sent events: numbered, resumable, with heartbeats. Knows no routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.context import Context
from core.bounds import Wire
from core.errors import JobNotFound, StoreError
from jobs.job import FINAL
from jobs.reports import LoggedEvent

HEARTBEAT = b": still here\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
MEDIA_TYPE = "text/event-stream"


class EventStream(StreamingResponse):
    """A streaming answer that ends its source at once when the client goes away."""

    def __init__(self, frames: AsyncGenerator[bytes, None]) -> None:
        super().__init__(frames, headers=HEADERS, media_type=MEDIA_TYPE)
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._frames.aclose()


def frame(number: int, kind: str, fields: Wire) -> bytes:
    """One event on the wire; JSON has no line breaks, so one ``data:`` line is enough."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (number, kind.encode(), to_json(fields, inf_nan_mode="null"))


async def frames(context: Context, job_id: str, after: int) -> AsyncGenerator[bytes, None]:
    """Everything after event ``after`` as it comes; ``finished`` with the whole job is the last.

    A server that stops, or loses its store, ends the stream between two events: the client comes back with
    ``Last-Event-ID``.

    Raises:
        TooManyStreams: before the first frame.
    """
    with context.held.place():
        yield b": job %s\n\n" % job_id.encode()
        try:
            async for each in _events(context, job_id, after):
                yield each
        except (StoreError, JobNotFound) as error:
            yield b": %s\n\n" % error.code.encode()


async def nothing_left(context: Context, job_id: str, after: int) -> bool:
    """The client has seen the job's last event already.

    Raises:
        JobNotFound
    """
    job = await context.store.get(job_id)
    if job.state not in FINAL or await context.store.events(job_id, after):
        return False
    log = await context.store.events(job_id, -1)
    if not log:  # kept no longer than the job: stock RQ ended one that nobody had begun
        return after >= 0
    return after >= log[-1].number + (log[-1].type != "finished")


async def _events(context: Context, job_id: str, after: int) -> AsyncGenerator[bytes, None]:
    last = after
    async with aclosing(_with_heartbeats(context, context.store.watch(job_id, after))) as batches:
        async for events in batches:
            if not events:
                yield HEARTBEAT
            for event in events:
                last = event.number
                if event.type == "finished":
                    yield await _finished(context, job_id, last)
                    return
                yield frame(event.number, event.type, event.fields)
    if not context.held.closing:  # stock RQ ended the job: it writes no event of ours
        yield await _finished(context, job_id, last + 1)


async def _with_heartbeats(
    context: Context, watched: AsyncGenerator[list[LoggedEvent], None]
) -> AsyncGenerator[Sequence[LoggedEvent], None]:
    """``watched``, with an empty list for each heartbeat's length of silence; ends when the server stops."""
    held, seconds = context.held, context.settings.heartbeat_seconds
    future = await held.first(_next(watched), seconds)
    try:
        while not held.closing:
            if not future.done():
                yield ()
                future = await held.first(future, seconds)
                continue
            events = future.result()
            if events is None:
                return
            yield events
            future = await held.first(_next(watched), seconds)
    finally:
        future.cancel()
        await asyncio.wait({future})  # a generator can be closed only when nobody is inside
        await watched.aclose()


async def _next(watched: AsyncGenerator[list[LoggedEvent], None]) -> list[LoggedEvent] | None:
    return await anext(watched, None)


async def _finished(context: Context, job_id: str, number: int) -> bytes:
    return frame(number, "finished", {"job": await context.wire(await context.store.get(job_id))})
