"""What a job is: its states, the one table of moves, and the shape that a poll answers. Knows no Redis."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.bounds import Wire
from core.request import Kind, Request


class JobState(enum.StrEnum):
    """Values are on the wire and in Redis: add, never rename."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


S = JobState

#: Every change of state there is. The scripts in ``jobs/scripts`` do these and no other; a test walks them.
MOVES: Mapping[JobState, frozenset[JobState]] = {
    # claim; cancel; deadline; a late result of a reaped attempt; a dead letter found at the reaper
    S.QUEUED: frozenset({S.RUNNING, S.CANCELLED, S.EXPIRED, S.SUCCEEDED, S.FAILED}),
    S.RUNNING: frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED, S.EXPIRED, S.QUEUED}),
    S.FAILED: frozenset({S.QUEUED}),  # retried by a person
    S.SUCCEEDED: frozenset(),
    S.CANCELLED: frozenset(),
    S.EXPIRED: frozenset(),
}

FINAL = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED, S.EXPIRED})

#: RQ's word for a state, as ``rq info`` and dashboards show it; EXPIRED is RQ's "failed" with a reason of ours.
RQ_STATUS: Mapping[JobState, str] = {
    S.QUEUED: "queued",
    S.RUNNING: "started",
    S.SUCCEEDED: "finished",
    S.FAILED: "failed",
    S.CANCELLED: "canceled",
    S.EXPIRED: "failed",
}

#: The labels stock RQ may enqueue. They are looked up here and never imported.
FUNCTIONS: Mapping[str, Kind] = {"headrace.generate": Kind.GENERATE, "headrace.predict": Kind.PREDICT}
LABELS: Mapping[Kind, str] = {kind: label for label, kind in FUNCTIONS.items()}

QUEUE = "generate"  #: the RQ queue
WEBHOOK_EVENTS = ("completed",)  #: what a client may be called back for: the end, whichever it is


class Resume(enum.StrEnum):
    """What becomes of a begun answer when only an engine is there that computes otherwise. Values are in Redis."""

    WAIT = "wait"  #: for an engine of the kind that began it
    RESTART = "restart"  #: from the beginning if nobody has read of it; else as WAIT
    ANY = "any"  #: any engine goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Who is told that a job has ended, and how far that has got."""

    url: str
    id: str | None = None  #: of the callback; None while the job has not ended
    state: str | None = None  #: pending, delivered or failed
    attempts: int = 0
    last_error: str | None = None

    def to_wire(self) -> Wire:
        told = {"id": self.id, "state": self.state, "attempts": self.attempts, "last_error": self.last_error}
        return {"url": self.url, "events": list(WEBHOOK_EVENTS), **told}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job as it is submitted."""

    id: str
    request: Request
    deadline_seconds: float | None = None  #: after submission; then it ends as EXPIRED, with what it has
    resume: Resume = Resume.RESTART
    refuse_if_late: bool = False  #: not taken at all where the queue is too long for the deadline
    result_ttl_seconds: int = 86_400  #: how long result, error and events are kept after the end
    metadata: Mapping[str, str] = field(default_factory=dict)
    webhook: str | None = None  #: the address that is told of its end
    awaited: bool = False  #: the submitter waits for its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A durable request with a state and an attempt number, as read from Redis. Times: Unix seconds, the server's."""

    id: str
    state: JobState
    kind: Kind
    created_at: float
    model: str | None = None  #: as the request names it
    request: Request | None = None  #: what was asked, as a submission answers it; a poll does not read it again
    started_at: float | None = None  #: of the last attempt
    first_token_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None  #: when it will be forgotten
    deadline_at: float | None = None
    attempt: int = 0  #: raised by each claim, lowered by nothing: the fence
    crashes: int = 0
    deaths: tuple[Wire, ...] = ()  #: how the workers that ran it died, the last five; gone once it succeeds
    worker: str | None = None
    tokens_generated: int = 0
    cancel_requested: bool = False
    resume: Resume = Resume.RESTART
    priority: int = 0  #: the lower, the earlier
    waiting_for: str | None = None  #: identity of the engine that alone may go on with the answer
    queue_position: int | None = None  #: an estimate, from counters; None when unknown or not queued
    result: Wire | None = None
    error: Wire | None = None
    reason: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    webhook: Webhook | None = None
    result_ttl_seconds: int = 86_400

    def to_wire(self, *, eta_seconds: float | None = None) -> dict[str, Any]:
        """The job as clients see it (docs/wire.md); the prompt is not repeated."""
        return {
            "id": self.id,
            "object": "job",
            "kind": self.kind.value,
            "model": self.model,
            "status": self.state.value,
            "created_at": self.created_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "expires_at": self.expires_at,
            "attempt": self.attempt,
            "priority": self.priority,
            "queue_position": self.queue_position,
            "eta_seconds": eta_seconds,
            "tokens_generated": self.tokens_generated,
            "result": self.result,
            "error": self.error,
            "reason": self.reason,
            "worker": self.worker,
            "resume": self.resume.value,
            "waiting_for": self.waiting_for,
            "deaths": [dict(death) for death in self.deaths],
            "cached": False,
            "timings": self._timings(),
            "metadata": dict(self.metadata),
            "webhook": self.webhook.to_wire() if self.webhook else None,
            "urls": {
                "self": f"/v1/jobs/{self.id}",
                "events": f"/v1/jobs/{self.id}/events",
                "cancel": f"/v1/jobs/{self.id}/cancel",
            },
        }

    def _timings(self) -> dict[str, int | None]:
        return {
            "queued_ms": _between(self.created_at, self.started_at),
            "first_token_ms": _between(self.created_at, self.first_token_at),
            "running_ms": _between(self.started_at, self.finished_at),
        }


def _between(start: float | None, end: float | None) -> int | None:
    return None if start is None or end is None else max(0, round((end - start) * 1000))
