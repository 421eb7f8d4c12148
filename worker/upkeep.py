"""What any live worker does for all: dead workers' jobs, deadlines, retries, and its share of the cores."""

from __future__ import annotations

import time
from collections.abc import Callable

from jobs.store import Store
from worker.cores import CoreShare
from worker.outage import Every

SHARE_TICKS = 5  #: once in so many the cores are shared anew: workers come and go seldom


class Upkeep:
    """Done by every worker in turn; each of Redis' scripts is harmless however many call it."""

    def __init__(
        self, store: Store, share: CoreShare, tick_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._share = share
        self._every = Every(tick_seconds, clock)
        self._shares = Every(SHARE_TICKS * tick_seconds, clock)

    @property
    def next_seconds(self) -> float:
        """Until it is due again."""
        return self._every.in_seconds

    def do_if_due(self) -> int | None:
        """Look after the others, if it is time; the engine's threads from now on, if that changes.

        Raises:
            StoreUnavailable: some of it is done; the rest comes next time.
        """
        if not self._every.due():
            return None
        self._store.tend()
        return self._share.adjust() if self._shares.due() else None
