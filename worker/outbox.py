"""What happened to jobs and is not yet confirmed by Redis: kept in order, through any outage.

What a report says stays here until it is confirmed. The tokens of several steps that go in one report are one event a
choice.
"""

from __future__ import annotations

import itertools
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import EngineError, HeadraceError
from core.request import FinishReason, Result, TokenEvent
from jobs.store import Outcome, Publication, Settlement
from worker.running import Running

log = logging.getLogger("headrace.worker")

OUTCOMES: Mapping[FinishReason, Outcome] = {
    "stop": Outcome.SUCCEEDED,
    "length": Outcome.SUCCEEDED,
    "cancelled": Outcome.CANCELLED,
    "deadline": Outcome.EXPIRED,
}


@dataclass(slots=True, eq=False)
class Unpublished:
    """The consecutive events of one attempt that Redis has not confirmed.

    Invariant: an event that was sent has its number for ever, as Redis may have it.
    """

    running: Running
    first: int  #: number of the first of them
    events: list[TokenEvent] = field(default_factory=list)  #: sent, each as it will be in the log
    fresh: list[TokenEvent] = field(default_factory=list)  #: after them, as they came from the engine

    @property
    def urgent(self) -> bool:
        """Somebody reads along, or is about to: with the first token."""
        return self.running.watched or (self.running.young and not self.running.published)

    def publication(self, now: float) -> Publication:
        """All that is to be sent."""
        running = self.running
        age_ms = round(1000 * (now - (running.began_at or now)))
        self.events += merge(self.fresh)
        self.fresh = []
        running.next_event = self.first + len(self.events)
        attempt, events = running.attempt, [*self.events]
        return Publication(job_id=running.job_id, attempt=attempt, first=self.first, events=events, age_ms=age_ms)

    def confirm(self, count: int) -> None:
        """Redis has the first ``count``."""
        self.running.published += sum(len(event.token_ids) for event in self.events[:count])
        del self.events[:count]
        self.first += count


def merge(events: Sequence[TokenEvent]) -> list[TokenEvent]:
    """The same tokens with one event a choice, in the order of their first."""
    if len(events) < 2:
        return [*events]
    choices: dict[int, list[TokenEvent]] = {}
    for event in events:
        choices.setdefault(event.index, []).append(event)
    return [_join(each) if len(each) > 1 else each[0] for each in choices.values()]


def _join(events: Sequence[TokenEvent]) -> TokenEvent:
    """Several events of one choice as one."""
    chain = itertools.chain.from_iterable
    scored = [event.logprobs for event in events if event.logprobs is not None]
    return TokenEvent(
        job_id=events[0].job_id,
        index=events[0].index,
        text="".join(event.text for event in events),
        token_ids=tuple(chain(event.token_ids for event in events)),
        logprobs=tuple(chain(scored)) if scored else None,
    )


class Outbox:
    """Publications and settlements on their way. Sending twice is safe: Redis skips what it has."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unpublished: dict[str, Unpublished] = {}  # by job
        self._settlements: dict[str, Settlement] = {}
        self._urgent = False  # some of it is, and came after the last report was drawn

    def __len__(self) -> int:
        return len(self._unpublished) + len(self._settlements)

    @property
    def settling(self) -> dict[str, int]:
        """The attempts whose end Redis has not confirmed, by job."""
        return {settlement.job_id: settlement.attempt for settlement in self._settlements.values()}

    @property
    def pressing(self) -> bool:
        """Something in it is not to wait for the rest."""
        return self._urgent or bool(self._settlements)

    def publish(self, running: Running, event: TokenEvent) -> None:
        """Take the next token event of a job."""
        unpublished = self._unpublished.get(running.job_id)
        if unpublished is None:
            if running.began_at is None:
                running.began_at = self._clock()
            unpublished = self._unpublished[running.job_id] = Unpublished(running, running.next_event)
        unpublished.fresh.append(event)
        self._urgent = self._urgent or unpublished.urgent

    def finish(self, running: Running, result: Result) -> None:
        """Take the result of a job; how it ended is in its choices, or was asked for before there was one."""
        complete = result.token_ids is not None and len(result.token_ids) == result.usage.prompt_tokens
        asked = "stop" if complete or running.ending is None else running.ending
        outcomes = {OUTCOMES[choice.finish_reason] for choice in result.choices} or {OUTCOMES[asked]}
        outcome = next(iter(outcomes - {Outcome.SUCCEEDED}), Outcome.SUCCEEDED)  # one choice cut short: so is the job
        self._settle(running, outcome, result=result)

    def fail(self, running: Running, error: Exception) -> None:
        """Take the failure of a job; what an error outside our tree says is for the log, not for clients."""
        if not isinstance(error, HeadraceError):
            log.error("the engine failed job %s", running.job_id, exc_info=error)
            error = EngineError(f"the engine failed: {type(error).__name__}")
        message = "".join(traceback.format_exception_only(error))
        self._settle(running, Outcome.FAILED, error=error, traceback=message)

    def _settle(self, running: Running, outcome: Outcome, **how: Any) -> None:
        seconds, job_id = self._clock() - running.claimed_at, running.job_id
        settlement = Settlement(job_id=job_id, attempt=running.attempt, outcome=outcome, seconds=seconds, **how)
        self._settlements[running.job_id] = settlement

    def drop(self, job_id: str) -> None:
        """Forget what was to be said of a job that is not ours any more."""
        self._unpublished.pop(job_id, None)
        self._settlements.pop(job_id, None)

    def draw(self, *, everything: bool) -> Report:
        """What is to be said now: ends and what goes before them, and urgent tokens; or ``everything``."""
        chosen = [
            each
            for job_id, each in self._unpublished.items()
            if everything or each.urgent or job_id in self._settlements
        ]
        self._urgent, now = False, self._clock()
        publications = [each.publication(now) for each in chosen]
        counts = [(each, len(each.events)) for each in chosen]
        return Report(publications, list(self._settlements.values()), counts)

    def confirm(self, report: Report) -> None:
        """Redis has what this report said."""
        for each, count in report.counts:
            each.confirm(count)
        self._unpublished = {job_id: each for job_id, each in self._unpublished.items() if each.events or each.fresh}
        done = {id(settlement) for settlement in report.settlements}
        self._settlements = {job_id: each for job_id, each in self._settlements.items() if id(each) not in done}


@dataclass(frozen=True, slots=True)
class Report:
    """What is said at once."""

    publications: Sequence[Publication]
    settlements: Sequence[Settlement]
    counts: Sequence[tuple[Unpublished, int]]  #: how many events of each are in it

    def __bool__(self) -> bool:
        return bool(self.publications or self.settlements)
