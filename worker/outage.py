"""When to speak to Redis again after it did not answer, and things that are due every so often."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

log = logging.getLogger("headrace.worker")

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 0.5
ASK_SECONDS = 0.5  #: a busy worker that has room asks so often whether jobs wait of which it did not hear


class Outage:
    """Redis is away or it is not; while it is, the worker computes on and knocks now and then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pause = 0.0  #: 0: no outage
        self._since = 0.0
        self._retry_at = 0.0

    @property
    def wait_seconds(self) -> float:
        """Until the next try; 0 when Redis is there or may be tried."""
        return max(0.0, self._retry_at - self._clock()) if self._pause else 0.0

    def begin(self, error: Exception) -> None:
        """Redis did not answer."""
        now = self._clock()
        if not self._pause:
            self._since = now
            log.error("%s; computing on", error)
        self._pause = min(LONGEST_PAUSE_SECONDS, 2 * self._pause or FIRST_PAUSE_SECONDS)
        self._retry_at = self._clock() + self._pause

    def end(self) -> None:
        """Redis answered."""
        if self._pause:
            log.info("the job store is back after %.1f s", self._clock() - self._since)
        self._pause = 0.0


class Every:
    """True once in so many seconds, the first time at once."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._due_at = clock()

    @property
    def in_seconds(self) -> float:
        return max(0.0, self._due_at - self._clock())

    def due(self) -> bool:
        """Whether it is time; asking sets the next time."""
        if self.in_seconds > 0:
            return False
        self.put_off()
        return True

    def put_off(self) -> None:
        """Be due in the whole time."""
        self._due_at = self._clock() + self._seconds

    def hurry(self, seconds: float = 0.0) -> None:
        """Be due in at most so many seconds."""
        self._due_at = min(self._due_at, self._clock() + seconds)


class Pace:
    """When to talk with Redis while there is something to compute. Asking whether it is time sets the next time."""

    def __init__(self, seconds: float, unread_seconds: float, clock: Callable[[], float]) -> None:
        """Take the shortest times between two reports: any, and of jobs that nobody reads along."""
        self._some = Every(seconds, clock)
        self._all = Every(unread_seconds, clock)  # with the next report of any
        self._ask = Every(ASK_SECONDS, clock)
        self._clock = clock
        self._quiet_until = -math.inf

    def due(self) -> bool:
        """Whether it is time to report what is pressing."""
        return self._some.due()

    def all_due(self, *, told: bool = False) -> bool:
        """Whether it is time to report of every job; ``told``: it is done in any case, before the next step."""
        if told:
            self._all.put_off()
            return True
        if self._some.in_seconds > 0 or not self._all.due():
            return False
        self._some.put_off()
        return True

    def ask_due(self) -> bool:
        """Whether it is time to ask for more jobs."""
        return self._ask.due()

    @property
    def quiet(self) -> bool:
        """Nothing is due, unless something happens."""
        return self._clock() < self._quiet_until

    def be_quiet(self, most_seconds: float) -> None:
        """Until one of these is due, or for so long, or until something is heard."""
        self._quiet_until = self._clock() + min(self._all.in_seconds, self._ask.in_seconds, most_seconds)

    def hear(self, *, told: bool) -> None:
        """A talk is over; ``told``: whether jobs wait, too."""
        self._quiet_until = -math.inf
        if told:
            self._ask.put_off()

    def hurry(self) -> None:
        """Report of every job at once."""
        self._some.hurry()
        self._all.hurry()
