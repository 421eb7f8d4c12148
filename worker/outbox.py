"""What happened to jobs and is not yet confirmed by Redis: kept in order, through any outage."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping

from core.errors import EngineError, HeadraceError
from core.request import FinishReason, Result, TokenEvent
from jobs.store import Outcome, Publication, Reported, Settlement, Store
from worker.running import Running

log = logging.getLogger("headrace.worker")

OUTCOMES: Mapping[FinishReason, Outcome] = {
    "stop": Outcome.SUCCEEDED,
    "length": Outcome.SUCCEEDED,
    "cancelled": Outcome.CANCELLED,
    "deadline": Outcome.EXPIRED,
}


class Outbox:
    """Publications and settlements on their way. Sending twice is safe: Redis skips what it has."""

    def __init__(self) -> None:
        self._events: dict[str, list[TokenEvent]] = {}  # by job; an attempt's events are consecutive
        self._publications: dict[str, Publication] = {}  # each holds its job's list of _events
        self._settlements: dict[str, Settlement] = {}

    def __len__(self) -> int:
        return len(self._publications) + len(self._settlements)

    @property
    def settling(self) -> dict[str, int]:
        """The attempts whose end Redis has not confirmed, by job."""
        return {settlement.job_id: settlement.attempt for settlement in self._settlements.values()}

    def publish(self, running: Running, event: TokenEvent) -> None:
        """Take the next token event of a job."""
        job_id, number = running.job_id, running.next_event
        if job_id not in self._publications:
            events = self._events[job_id] = []
            self._publications[job_id] = Publication(
                job_id=job_id, attempt=running.attempt, first=number, events=events
            )
        self._events[job_id].append(event)
        running.next_event += 1
        running.drawn += len(event.token_ids)

    def finish(self, running: Running, result: Result) -> None:
        """Take the result of a job; how it ended is in its choices, or was asked for before there was one."""
        complete = result.token_ids is not None and len(result.token_ids) == result.usage.prompt_tokens
        asked = "stop" if complete or running.ending is None else running.ending
        outcomes = {OUTCOMES[choice.finish_reason] for choice in result.choices} or {OUTCOMES[asked]}
        outcome = next(iter(outcomes - {Outcome.SUCCEEDED}), Outcome.SUCCEEDED)  # one choice cut short: so is the job
        settlement = Settlement(job_id=running.job_id, attempt=running.attempt, outcome=outcome, result=result)
        self._settlements[running.job_id] = settlement

    def fail(self, job_id: str, attempt: int, error: Exception) -> None:
        """Take the failure of a job; what an error outside our tree says is for the log, not for clients."""
        if not isinstance(error, HeadraceError):
            log.error("the engine failed job %s", job_id, exc_info=error)
            error = EngineError(f"the engine failed: {type(error).__name__}")
        settlement = Settlement(
            job_id=job_id,
            attempt=attempt,
            outcome=Outcome.FAILED,
            error=error,
            traceback="".join(traceback.format_exception_only(error)),
        )
        self._settlements[job_id] = settlement

    def drop(self, job_id: str) -> None:
        """Forget what was to be said of a job that is not ours any more."""
        self._publications.pop(job_id, None)
        self._events.pop(job_id, None)
        self._settlements.pop(job_id, None)

    def send(self, store: Store) -> Reported:
        """Write everything in one round trip.

        Raises:
            StoreUnavailable: everything stays, for the next time.
        """
        if not self:
            return Reported()
        reported = store.report(list(self._publications.values()), list(self._settlements.values()))
        self._publications.clear()
        self._events.clear()
        self._settlements.clear()
        return reported
