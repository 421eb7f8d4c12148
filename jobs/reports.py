"""What the store tells about jobs, workers and itself. Plain values; knows no Redis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from core.bounds import Wire
from core.card import ModelCard
from jobs.job import Job, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What became of a submission."""

    job: Job  #: with its ``request``: on a repeat, the one that came first
    created: bool  #: False: the id was known already, and the job is the one that has it


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEvent:
    """One event of a job, as it stands in its log."""

    number: int  #: from 0 without a hole; after a retry the log starts at a higher one
    type: Literal["started", "token", "finished"]
    fields: Wire  #: the event's ``data`` on the wire; ``finished`` has none here


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCard:
    """A worker that lives, as others see it."""

    name: str
    host: str
    pid: int
    model: ModelCard | None = None  #: None while it loads
    state: str = "idle"  #: idle, busy, suspended or draining
    running: int = 0  #: jobs in its engine
    started_at: float = 0.0  #: Unix seconds, the server's
    stats: Mapping[str, Any] = field(default_factory=dict)  #: the engine's counters since it started
    boot_id: str = ""  #: workers with the same one share a host and its cores


@dataclass(frozen=True, slots=True, kw_only=True)
class CallbackReport:
    """What became of callbacks."""

    waiting: int = 0  #: to be delivered, now or at their next try
    delivered: int = 0  #: since the queue was made
    failed: int = 0  #: given up since then


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueReport:
    """The queue at a glance."""

    states: Mapping[JobState, int]  #: remembered jobs, by state
    completions_per_second: float  #: over the last minute
    suspects: int  #: jobs that wait to run alone after two crashes
    dead_letters: int  #: failed jobs that were running each time their worker died
    callbacks: CallbackReport = CallbackReport()

    @property
    def queued(self) -> int:
        return self.states.get(JobState.QUEUED, 0)

    @property
    def running(self) -> int:
        return self.states.get(JobState.RUNNING, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReport:
    """The Redis server, as far as it lets us look."""

    software: str  #: "valkey" or "redis"
    version: str
    append_only: bool
    fsync: str  #: "always", "everysec", "no", or "unknown" where CONFIG is denied
    eviction: str  #: the policy, or "none" without a memory limit
    durability: str  #: what a 202 means here: "replica", "fsync" or "memory"
