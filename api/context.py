"""What every route works with, made once by ``api.app.create_app``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from api.fleet import Fleet
from api.held import Held
from api.metrics import Metrics
from api.settings import ApiSettings
from core.bounds import Wire
from jobs.async_store import AsyncStore
from jobs.job import Job
from jobs.webhooks import AllowedHosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One of each, for one process."""

    settings: ApiSettings
    store: AsyncStore
    fleet: Fleet
    held: Held
    metrics: Metrics
    hosts: AllowedHosts

    async def wire(self, job: Job) -> Wire:
        """The job as clients see it, with an estimate of when its turn comes."""
        return job.to_wire(eta_seconds=await self.fleet.eta_seconds(job))

    async def wait(self, job_id: str, seconds: float, *, seen: Job | None = None) -> Job:
        """The job, once it has ended, the time is over, or the server stops.

        Without a place for one more held request it answers at once: a poll is always right.

        Args:
            seen: the job as the caller saw it unfinished a moment ago.

        Raises:
            JobNotFound
        """
        if seconds <= 0 or self.held.full:
            return await self.store.get(job_id)
        with self.held.place():
            async with self.held.until_closed():
                return await self.store.wait(job_id, seconds, seen=seen)
        return await self.store.get(job_id)


async def context(request: Request) -> Context:
    """What ``request`` is answered with."""
    found: Context = request.app.state.context
    return found


Here = Annotated[Context, Depends(context)]
