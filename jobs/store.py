"""The door to Redis for a worker: one connection, one thread. What it says and hears is in ``jobs.work``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from core.request import Emitted, Kind, ModelCard, Wire
from jobs.job import Job, JobState, NewJob
from jobs.reports import LoggedEvent, QueueReport, ServerReport, Submitted, WorkerCard
from jobs.settings import StoreSettings
from jobs.work import Beat, Claim, ClaimedJob, Outcome, Publication, ReapReport, Reported, Settlement

__all__ = [
    "Beat", "Claim", "ClaimedJob", "LoggedEvent", "Outcome", "Publication", "QueueReport", "ReapReport", "Reported",
    "ServerReport", "Settlement", "Store", "Submitted", "WorkerCard",
]  # fmt: skip


class Store:
    """Signatures first; filled within minutes. Every call may raise StoreUnavailable."""

    @classmethod
    def connect(cls, settings: StoreSettings) -> Store:
        """Open ``settings.redis_url``; nothing is sent yet."""
        raise NotImplementedError

    def close(self) -> None: ...

    def inspect(self) -> ServerReport:
        """Raises UnsafeServer, StoreUnavailable."""
        raise NotImplementedError

    def submit(self, job: NewJob) -> Submitted:
        """Raises QueueFull, NotDurable."""
        raise NotImplementedError

    def get(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        raise NotImplementedError

    def list(
        self, *, states: Collection[JobState] = (), kinds: Collection[Kind] = (), after: str | None = None, limit: int = 20
    ) -> list[Job]:
        raise NotImplementedError

    def cancel(self, job_id: str) -> Job:
        raise NotImplementedError

    def retry(self, job_id: str) -> Job:
        raise NotImplementedError

    def delete(self, job_id: str) -> None:
        raise NotImplementedError

    def events(self, job_id: str, after: int = -1) -> Sequence[LoggedEvent]:
        raise NotImplementedError

    def workers(self) -> Sequence[WorkerCard]:
        raise NotImplementedError

    def models(self) -> Sequence[ModelCard]:
        """Of live workers."""
        raise NotImplementedError

    def known(self) -> Sequence[ModelCard]:
        """Of workers ever seen."""
        raise NotImplementedError

    def queue(self) -> QueueReport:
        raise NotImplementedError

    # -- a worker's own
    def birth(self, card: WorkerCard) -> None:
        """Take a lease and show the card. Again with another card: the card is replaced."""
        raise NotImplementedError

    def renew(self, worker: str, state: str, running: Mapping[str, int], stats: Wire) -> Beat:
        """Args: running: job id -> attempt of every job it knows of, unsent settlements included."""
        raise NotImplementedError

    def death(self, worker: str) -> None:
        raise NotImplementedError

    def claim(self, worker: str, card: ModelCard, room: int, running: int) -> Claim:
        """Nothing while suspended (``rq suspend``) or without a lease (``birth`` first)."""
        raise NotImplementedError

    def report(self, publications: Sequence[Publication], settlements: Sequence[Settlement]) -> Reported:
        """One pipeline; calling it again after a lost reply is harmless."""
        raise NotImplementedError

    def release(self, jobs: Iterable[tuple[str, int]]) -> None:
        """Hand jobs (id, attempt) back to the front of the queue, in their order, with their tokens."""
        raise NotImplementedError

    def reap(self) -> ReapReport:
        raise NotImplementedError

    def expire(self) -> int:
        """End queued jobs whose deadline passed, forget those whose retention is over; how many."""
        raise NotImplementedError

    def promote(self) -> int:
        raise NotImplementedError

    def expire_lease(self, worker: str) -> ReapReport:
        """For the parent that saw the worker's process die: its jobs go on at once."""
        raise NotImplementedError

    def wait(self, timeout_seconds: float) -> bool:
        """Block until a job may be there to claim, on a connection of its own; False when the time was over."""
        raise NotImplementedError

    def emitted(self, job_id: str) -> tuple[Emitted, str | None]:
        """What earlier attempts published, and the ``ModelCard.identity`` of the engine that began."""
        raise NotImplementedError
