"""What passes between the store and a worker: claims, publications, settlements. Plain values; knows no Redis."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.card import ModelCard
from core.errors import HeadraceError, RequestError
from core.request import Request, Result, TokenEvent


class Outcome(enum.StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"  #: tried again where the submitter asked RQ for retries and the error is not the request's
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedJob:
    """A job that is ours until the lease runs out."""

    id: str
    attempt: int  #: the fence: every write about the job carries it
    request: Request | HeadraceError  #: the error: it cannot be computed here, and is to be settled as failed
    next_event: int  #: number of the next event in the log, after the ``started`` that claiming wrote
    deadline_in_seconds: float | None = None
    timeout_seconds: float | None = None  #: RQ's ``job_timeout``, for this attempt
    crashes: int = 0
    watched: bool = False  #: somebody reads along
    young: bool = False  #: submitted a moment ago, and not waited for: who wants to read along may not have begun to


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a worker asks for when it claims."""

    worker: str
    card: ModelCard  #: of its engine
    room: int  #: jobs, at most
    running: int  #: jobs it has; an empty worker takes suspects first


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one call brought."""

    jobs: Sequence[ClaimedJob] = ()
    alone: bool = False  #: the one job is a suspect: nothing may join before it has published two tokens
    hold: bool = False  #: a suspect waits: claim nothing more until the engine is empty
    more: bool = False  #: the call's bound was reached before the queue's end: ask again soon


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Consecutive token events of one attempt."""

    job_id: str
    attempt: int
    first: int  #: number of the first one
    events: Sequence[TokenEvent]
    age_ms: int = 0  #: since the attempt's first token was drawn; counts where that one is among these


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """The end of one attempt."""

    job_id: str
    attempt: int
    outcome: Outcome
    result: Result | None = None  #: of SUCCEEDED; of CANCELLED and EXPIRED as far as it got
    error: HeadraceError | None = None  #: of FAILED
    traceback: str = ""  #: for RQ's failed-job page; the error's message where empty
    seconds: float = 0.0  #: since it was claimed

    @property
    def permanent(self) -> bool:
        """Trying again would change nothing."""
        return isinstance(self.error, RequestError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What became of a report."""

    refused: frozenset[str] = frozenset()  #: jobs that are not ours any more: drop them
    cancels: frozenset[str] = frozenset()  #: jobs somebody wants ended
    watched: frozenset[str] = frozenset()  #: jobs somebody reads along: publish promptly
    with_dependents: tuple[str, ...] = ()  #: settled, and RQ's own code has released what waited for them
    waiting: bool = False  #: there may be jobs to claim
    claim: Claim | None = None  #: if one was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a renewed lease brings to light."""

    lost: tuple[str, ...] = ()  #: jobs that are not ours any more: drop them
    cancels: tuple[str, ...] = ()  #: jobs somebody wants ended
    suspended: bool = False  #: by ``rq suspend``: claim nothing
    unknown: tuple[tuple[str, int], ...] = ()  #: job id, attempt: claimed by a call whose reply was lost; release them
    aside: Sequence[Any] = ()  #: what was answered to the commands sent along


@dataclass(frozen=True, slots=True, kw_only=True)
class ReapReport:
    """What was done about workers that died."""

    requeued: int = 0  #: jobs that go on, suspects among them
    ended: int = 0  #: cancelled meanwhile
    dead: tuple[str, ...] = ()  #: job ids of new dead letters
    workers: tuple[str, ...] = ()  #: names that are forgotten now
