"""The outbox, for who delivers: take callbacks that are due, note how each went. Knows no HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.connection import connect_async
from jobs.pulse import Pulse
from jobs.runner import AsyncRunner
from jobs.scripting import Command
from jobs.settings import StoreSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Callback:
    """One end of one job that somebody is to be told of, and the attempt that now begins."""

    id: str  #: the same at every attempt
    attempt: int  #: raised by each taking, lowered by nothing: the fence
    tries: int  #: this attempt included, since it was last sent anew
    job_id: str
    url: str
    type: str  #: ``job.succeeded``, ``job.failed``, ``job.cancelled``, ``job.expired``
    ended_at: int  #: Unix seconds, the server's


class Outbox:
    """Every operation, for one event loop. Each may raise StoreUnavailable; calling it again is harmless."""

    def __init__(self, settings: StoreSettings) -> None:
        """Take ``settings.redis_url``; nothing is sent yet."""
        self._pulse = Pulse(connect_async(settings.redis_url))
        self._runner = AsyncRunner(connect_async(settings.redis_url), settings.result_ttl_seconds, self._pulse)

    async def collect(self, lease_seconds: float, bound: int) -> list[Callback]:
        """Take up to ``bound`` callbacks that are due; one that is not noted within the lease is due again."""
        return await self._runner.run(collect(lease_seconds, bound))

    async def delivered(self, callback: Callback) -> None:
        """The receiver has it."""
        await self._runner.run(note(callback, "delivered"))

    async def failed(self, callback: Callback, problem: str, again_in_seconds: float | None) -> None:
        """The receiver may not have it. None: nothing more is tried."""
        state = "failed" if again_in_seconds is None else "pending"
        await self._runner.run(note(callback, state, problem, again_in_seconds or 0))

    async def close(self) -> None:
        await self._runner.close()
        await self._pulse.close()


def collect(lease_seconds: float, bound: int) -> Command[list[Callback]]:
    return Command("collect", [round(lease_seconds * 1000), bound], lambda answer: [_callback(row) for row in answer])


def note(callback: Callback, state: str, problem: str = "", again_in_seconds: float = 0) -> Command[int]:
    args = [callback.id, callback.attempt, state, problem, round(again_in_seconds * 1000)]
    return Command("note", args, int)


def _callback(row: Any) -> Callback:
    name, attempt, before, job_id, url, kind, at = row
    return Callback(
        id=name.decode(),
        attempt=attempt,
        tries=attempt - int(before),
        job_id=job_id.decode(),
        url=url.decode(),
        type=kind.decode(),
        ended_at=int(at),
    )
