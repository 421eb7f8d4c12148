"""One talk with Redis: renew the lease, report, claim, look after the others. Touches nothing of the loop's.

It may be held beside a step, on a thread of its own: what is said is a snapshot, and what was heard is for the loop to
act on between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from core.bounds import Wire
from core.card import ModelCard
from core.errors import StoreUnavailable
from core.request import Emitted
from jobs.lookout import Lookout
from jobs.store import Beat, Claim, ClaimedJob, Reported, Store, Wanted
from worker.outbox import Report
from worker.presence import Presence
from worker.upkeep import Upkeep


@dataclass(frozen=True, slots=True, kw_only=True)
class Vital:
    """What a beat says: see ``Presence.beat``."""

    state: str
    holding: Mapping[str, int]
    stats: Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a loop has to say, as it stands between two steps."""

    vital: Vital | None  #: if it is time for a beat
    report: Report
    room: int  #: jobs to claim, at most
    running: int  #: jobs in the engine
    hungry: bool  #: claim in any case: otherwise only if the report's answer tells of jobs that wait


@dataclass(slots=True)
class Heard:
    """What Redis said to that. After a fault it holds what was heard before."""

    said: Said
    beat: Beat | None = None
    reported: Reported | None = None
    claim: Claim | None = None
    begun: list[tuple[ClaimedJob, tuple[Emitted, ...]]] = field(default_factory=list)  #: with what others had emitted
    threads: int | None = None  #: the engine's, from now on
    fault: StoreUnavailable | None = None
    cpu_seconds: float = 0.0  #: of the thread that talked


class Talk:
    """Holds talks, one at a time."""

    def __init__(self, store: Store, presence: Presence, upkeep: Upkeep, card: ModelCard, lookout: Lookout) -> None:
        """Take the parts; jobs are claimed for the engine of ``card``."""
        self._store = store
        self._lookout = lookout
        self._presence = presence
        self._upkeep = upkeep
        self._card = card

    @property
    def next_seconds(self) -> float:
        """Until there is something to say whatever the engine does."""
        return min(self._upkeep.next_seconds, self._presence.next_beat_seconds)

    def jobs_wait(self, *, ask: bool) -> bool:
        """Whether jobs wait, by what was answered to an earlier question; waits for nobody. ``ask``: ask again."""
        return self._lookout.jobs_wait(ask=ask)

    def hold(self, said: Said) -> Heard:
        """Talk; a server that is away is part of the answer."""
        heard, start = Heard(said), time.thread_time()
        try:
            self._hold(said, heard)
        except StoreUnavailable as fault:
            heard.fault = fault
        heard.cpu_seconds = time.thread_time() - start
        return heard

    def _hold(self, said: Said, heard: Heard) -> None:
        if said.vital is not None:
            heard.beat = self._presence.beat(said.vital.state, said.vital.holding, said.vital.stats)
        room = 0 if self._presence.suspended else said.room
        wanted = Wanted(self._presence.name, self._card, room, said.running)
        hungry = room > 0 and said.hungry
        if said.report or room:
            report = said.report
            reported = self._store.report(report.publications, report.settlements, wanted if hungry else None)
            heard.reported, heard.claim = reported, reported.claim
            self._presence.count([each for each in report.settlements if each.job_id not in reported.refused])
            if room and reported.waiting:
                heard.claim = self._store.claim(wanted)
        if heard.claim is not None:
            for job in heard.claim.jobs:  # at a fault the next beat hands back those that are not read yet
                heard.begun.append((job, self._store.emitted(job.id) if job.next_event > 1 else ()))
        heard.threads = self._upkeep.do_if_due()
        self._lookout.prepare()

    def wait(self, seconds: float) -> None:
        """Block until a job may be there.

        Raises:
            StoreUnavailable: Redis is away, or the wait was cut short.
        """
        self._store.wait(seconds)

    def leave(self, report: Report, unfinished: Sequence[tuple[str, int]]) -> None:
        """Say the last, hand back what still runs (id, attempt) in its order and with its tokens, and disappear.

        Raises:
            StoreUnavailable: leases run out, and results are computed again.
        """
        if report:
            self._store.report(report.publications, report.settlements)
        self._store.release(unfinished)
        self._presence.leave()
