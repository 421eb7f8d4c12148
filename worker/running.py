"""What is being computed here, and whether more may join. Knows no Redis and no engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from core.request import FinishReason
from jobs.store import Claim, ClaimedJob

ALONE_TOKENS = 2  #: a suspect that has published so many is taken for harmless


@dataclass(slots=True, eq=False)
class Running:
    """A claimed job while the engine has it. Times are on the monotonic clock."""

    job_id: str
    attempt: int  #: the fence
    next_event: int  #: number of the next event in the job's log
    deadline_at: float  #: then it ends as EXPIRED, with what it has
    timeout_at: float  #: then it has failed
    timeout_seconds: float
    claimed_at: float
    crashes: int = 0  #: workers that died of it, or beside it
    began_at: float | None = None  #: when its first token was drawn
    published: int = 0  #: tokens of this attempt that Redis has
    watched: bool = False  #: somebody reads along
    young: bool = False  #: somebody may be about to
    ending: FinishReason | None = None  #: the engine was told to end it, and why

    @property
    def limit_at(self) -> float:
        """When the engine must be done with it."""
        return min(self.deadline_at, self.timeout_at)

    @classmethod
    def start(cls, job: ClaimedJob, now: float) -> Running:
        """A job that is claimed now."""
        timeout = math.inf if job.timeout_seconds is None else job.timeout_seconds
        deadline = math.inf if job.deadline_in_seconds is None else job.deadline_in_seconds
        return cls(
            job_id=job.id,
            attempt=job.attempt,
            next_event=job.next_event,
            deadline_at=now + deadline,
            timeout_at=now + timeout,
            timeout_seconds=timeout,
            claimed_at=now,
            crashes=job.crashes,
            watched=job.watched,
            young=job.young,
        )


class Gate:
    """The crash rule's two brakes on claiming: a suspect starts alone; a waiting suspect wants an empty worker."""

    def __init__(self) -> None:
        self._suspect = ""
        self._hold = False

    def opens(self, running: Mapping[str, Running]) -> bool:
        """Whether jobs may join those that run."""
        suspect = running.get(self._suspect)
        if suspect is not None and suspect.published < ALONE_TOKENS:
            return False
        if self._hold and running:
            return False
        self._suspect, self._hold = "", False
        return True

    def note(self, claim: Claim) -> None:
        """Remember what a claim asks for."""
        self._suspect = claim.jobs[0].id if claim.alone else ""
        self._hold = claim.hold
