"""That this worker is there: its lease, its face as an RQ worker, and what it is told. Computes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from core.bounds import Wire
from jobs.store import Beat, Outcome, Settlement, Store, WorkerCard
from worker.outage import Every
from worker.pulse import Pulse
from worker.rq_worker import RqWorker, StopCommand

PROMPTLY_SECONDS = 0.2  #: a changed state is shown so soon; not at once, or a short job would cost two beats


class Presence:
    """One live worker, as everybody else sees it."""

    def __init__(
        self,
        card: WorkerCard,
        store: Store,
        rq: RqWorker,
        pulse: Pulse,
        beat_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.suspended = False  #: by ``rq suspend``, as the last beat heard: the first one comes before any claim
        self._card = card
        self._store = store
        self._rq = rq
        self._pulse = pulse
        self._every = Every(beat_seconds, clock)
        self._shown = ""  # the state that the last beat told

    @property
    def name(self) -> str:
        return self._card.name

    @property
    def next_beat_seconds(self) -> float:
        return self._every.in_seconds

    def arrive(self) -> None:
        """Take a lease, and register with RQ.

        Raises:
            StoreUnavailable: to be tried again.
        """
        self._store.birth(self._card)
        self._rq.register()

    def due(self, state: str) -> bool:
        """Whether it is time for a beat; asking sets the next time, and a changed ``state`` brings it forward."""
        if state != self._shown:
            self._every.hurry(PROMPTLY_SECONDS)
        return self._every.due()

    def beat(self, state: str, holding: Mapping[str, int], stats: Wire) -> Beat:
        """Renew the lease, and hand back what Redis says we hold and we do not know.

        Args:
            state: what to show.
            holding: job id -> attempt, of all that is computed here or waits to be settled.
            stats: the counters for ``/metrics``.
        """
        beat = self._store.renew(self.name, state, holding, stats, aside=self._rq.words(state))
        self._rq.hear(beat.aside)
        if beat.unknown:
            self._store.release(beat.unknown)
        self._shown, self.suspended = state, beat.suspended
        return beat

    def count(self, settlements: Iterable[Settlement]) -> None:
        """Take what was done, for RQ's pages: the next beat tells."""
        for settlement in settlements:
            self._rq.count(settlement.outcome is Outcome.SUCCEEDED, settlement.seconds)

    def sign(self) -> None:
        """Give our parent a sign of life; it kills a process that gives none."""
        self._pulse.beat()

    def hurry(self) -> None:
        """Beat as soon as Redis answers."""
        self._every.hurry()

    def stop_commands(self) -> Iterator[StopCommand]:
        """What RQ's commands have asked to stop since the last call."""
        while self._rq.stops:
            yield self._rq.stops.popleft()

    def followed(self) -> Iterator[str]:
        """The jobs that somebody has begun to read along since the last call."""
        while self._rq.follows:
            yield self._rq.follows.popleft()

    def leave(self) -> None:
        """Give up the lease and disappear."""
        self._store.death(self.name)
        self._rq.leave()
