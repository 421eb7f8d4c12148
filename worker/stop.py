"""How a worker is told to stop: signals and commands set flags here, the loop looks between two steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

SAME_SIGNAL_SECONDS = 0.25  #: a supervisor that signals a whole group makes one SIGTERM two: ours and our parent's


class Stop:
    """Not stopping, draining until a time, or leaving now."""

    def __init__(self, drain_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._drain_seconds = drain_seconds
        self._clock = clock
        self._parent = os.getppid()
        self._asked_at: float | None = None
        self._until = float("inf")
        self._wake: Callable[[], object] | None = None

    @property
    def requested(self) -> bool:
        """No job is claimed any more."""
        return self._asked_at is not None

    @property
    def overdue(self) -> bool:
        """What still runs is handed back now."""
        return self.requested and self._clock() >= self._until

    def request(self) -> None:
        """Drain; asked a second time, or by the death of our parent, leave at once."""
        now = self._clock()
        if self._asked_at is None:
            self._asked_at, self._until = now, now + self._drain_seconds
        elif now - self._asked_at > SAME_SIGNAL_SECONDS:
            self._until = now
        if os.getppid() != self._parent:
            self._until = now
        if self._wake is not None:
            self._wake()

    def wake_with(self, wake: Callable[[], object]) -> None:
        """Call this at each request: from a signal handler, or from any thread."""
        self._wake = wake

    def listen(self) -> None:
        """Let SIGTERM and SIGINT ask."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.request())
