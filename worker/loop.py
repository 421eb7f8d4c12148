"""The loop: take in what Redis said → say what happened → step, of one engine. Knows no Redis command and no model.

It talks with Redis (``worker.talk``) on a second thread while the engine computes, one talk at a time, and acts on what
was heard between two steps. Only the loop begins talks and gives its parent signs of life, so a step that never returns
ends the lease and the signs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from concurrent.futures import Executor, Future

from core.bounds import Wire
from core.errors import EngineChanged, HeadraceError, JobTimeout, StoreUnavailable
from core.protocol import EngineProtocol
from core.request import Emitted, Event, FinishedEvent, FinishReason, TokenEvent
from jobs.store import ClaimedJob
from worker.cores import use_threads
from worker.outage import Outage, Pace
from worker.outbox import Outbox
from worker.presence import Presence
from worker.running import Gate, Running
from worker.stop import Stop
from worker.talk import Heard, Said, Talk, Vital

IDLE_SECONDS = 0.5  #: the longest an idle worker blocks: a job that stock RQ put in wakes nobody
SUSPENDED_SECONDS = 0.25  #: between two looks whether ``rq resume`` was called


class Worker:
    """One engine, and the jobs in it."""

    def __init__(
        self, engine: EngineProtocol, talk: Talk, presence: Presence, stop: Stop, pace: Pace, beside: Executor
    ) -> None:
        """Take the parts; ``beside`` is where talks are held while the engine computes."""
        self._engine = engine
        self._talk = talk
        self._presence = presence
        self._stop = stop
        self._pace = pace
        self._beside = beside
        self._clock = time.monotonic
        self._running: dict[str, Running] = {}  # in the order of their claims
        self._suspects: set[str] = set()  # those of them whose worker died, and some that are gone
        self._next_limit = math.inf  # no deadline and no time-out of theirs comes before
        self._outbox = Outbox()
        self._talking: Future[Heard] | None = None
        self._gate = Gate()
        self._outage = Outage(self._clock)
        self._waiting = True  # by what we heard last there may be jobs to claim
        self._more = False  # the last claim stopped before the queue's end
        self._cost = 0.0  # seconds outside step() with something to compute, and processor seconds of talks beside it
        self._apart = 0.0  # seconds in step()

    def run(self) -> None:
        """Claim, compute, report, until told to stop; then finish what was started, or hand it back.

        Raises:
            StoreUnavailable: Redis was away when we had to leave: leases run out, and results are computed again.
        """
        with self._beside:
            while self._going_on():
                self._presence.sign()
                self._turn()
                self._rest()
            self._leave()

    def _turn(self) -> None:
        """Once round; with nothing to compute it costs nobody anything."""
        start, apart, idle = self._clock(), self._apart, not self._running
        self._listen(patiently=idle)
        self._speak()
        self._obey()
        self._take(self._step())
        if self._running or not idle:
            self._cost += self._clock() - start - (self._apart - apart)

    def _going_on(self) -> bool:
        unfinished = bool(self._running or self._outbox)
        return not self._stop.requested or (unfinished and not self._stop.overdue)

    def _listen(self, *, patiently: bool) -> None:
        """Act on what Redis said, if the talk is over; ``patiently``: wait until it is."""
        if self._talking is not None and (patiently or self._talking.done()):
            heard, self._talking = self._talking.result(), None
            self._cost += heard.cpu_seconds
            self._act(heard)

    def _speak(self) -> None:
        """Begin to talk, if it is time and Redis is there: beside the step, or before it, where there is none.

        Before it beside a job whose worker died, too, and each time: should it die of that job again, all that the job
        had drawn is published, and the crash rule sees an attempt that got no further.
        """
        if self._talking is not None or self._outage.wait_seconds:
            return
        awake, room = not (self._running and self._pace.quiet), self._room
        ask = awake and self._pace.ask_due()  # without room, too: else it would keep us awake
        if room and self._running and not self._waiting:
            self._waiting = self._talk.jobs_wait(ask=ask)
        hungry = room > 0 and (self._waiting or not self._running)
        if not (awake or hungry or self._outbox.pressing):
            return
        first = not self._running or not self._suspects.isdisjoint(self._running)
        everything = self._pace.all_due(told=first)
        if not (everything or hungry or self._due()):
            self._pace.be_quiet(self._talk.next_seconds)
            return
        said = Said(
            vital=self._vital() if self._presence.due(self._state) else None,
            report=self._outbox.draw(everything=everything),
            room=room,
            running=len(self._running),
            hungry=hungry,
        )
        if first:
            self._act(self._talk.hold(said))
        else:
            self._talking = self._beside.submit(self._talk.hold, said)

    def _due(self) -> bool:
        """Whether it is time to talk, though not of everything: of what is pressing, or for the lease."""
        return (self._outbox.pressing and self._pace.due()) or self._talk.next_seconds <= 0

    @property
    def _room(self) -> int:
        """Jobs that may be claimed now."""
        if self._stop.requested or self._presence.suspended or not self._gate.opens(self._running):
            return 0
        return self._engine.room

    def _act(self, heard: Heard) -> None:
        """Do what follows from a talk. While Redis is away nothing is claimed, and what happens stays in the outbox."""
        self._more = False
        self._pace.hear(told=heard.reported is not None)
        if heard.reported is not None:
            self._outbox.confirm(heard.said.report)
            self._waiting = heard.reported.waiting
            for job_id in heard.reported.watched & self._running.keys():
                self._running[job_id].watched = True
            self._hear(heard.reported.refused, heard.reported.cancels)
        if heard.beat is not None:
            self._hear(heard.beat.lost, heard.beat.cancels)
        if heard.claim is not None:
            self._gate.note(heard.claim)
            self._more = heard.claim.more
            self._waiting = bool(heard.claim.jobs) or heard.claim.more
        for job, emitted in heard.begun:
            self._start(job, emitted)
        if heard.threads is not None:
            use_threads(heard.threads)
        if heard.fault is None:
            self._outage.end()
        else:
            self._outage.begin(heard.fault)
            self._presence.hurry()  # a claim may have been done and its reply lost: the next beat tells
            self._pace.hurry()  # what was not answered is sent again when Redis is back

    def _start(self, job: ClaimedJob, emitted: tuple[Emitted, ...]) -> None:
        """Put a claimed job into the engine; one that cannot be computed fails at once."""
        self._presence.sign()  # many long prompts take long to read
        running = Running.start(job, self._clock())
        try:
            if isinstance(job.request, HeadraceError):
                raise job.request
            if any(token_id >= self._engine.card.vocab_size for choice in emitted for token_id in choice.token_ids):
                raise EngineChanged(self._engine.card.identity)  # the submitter said that any engine may go on
            self._engine.add(job.id, job.request, emitted)
        except HeadraceError as error:
            self._outbox.fail(running, error)
        else:
            self._running[job.id] = running
            self._next_limit = min(self._next_limit, running.limit_at)
            self._suspects = {each.job_id for each in self._running.values() if each.crashes}

    def _obey(self) -> None:
        """Obey commands, deadlines and time-outs: the next step ends jobs with what they have."""
        for job_id in self._presence.followed():
            if job_id in self._running:
                self._running[job_id].watched = True
        for command in self._presence.stop_commands():
            self._cancel(command.job_id, command.attempt)
        now = self._clock()
        if now < self._next_limit:
            return
        for running in list(self._running.values()):
            if now >= running.timeout_at:
                self._outbox.fail(running, JobTimeout(running.timeout_seconds))
                self._forget(running.job_id)
            elif now >= running.deadline_at:
                self._end(running, "deadline")
        self._next_limit = min((running.limit_at for running in self._running.values()), default=math.inf)

    def _step(self) -> list[Event]:
        if self._engine.idle:
            return []
        start = self._clock()
        events = self._engine.step()
        self._apart += self._clock() - start
        return events

    def _take(self, events: list[Event]) -> None:
        """Put what happened into the outbox."""
        for event in events:
            running = self._running[event.job_id]
            if isinstance(event, TokenEvent):
                self._outbox.publish(running, event)
                continue
            del self._running[event.job_id]
            if isinstance(event, FinishedEvent):
                self._outbox.finish(running, event.result)
            else:
                self._outbox.fail(running, event.error)

    def _rest(self) -> None:
        """With nothing to compute and nothing to report, block until a job may be there."""
        if self._running or self._talking or (not self._outage.wait_seconds and (self._outbox or self._more)):
            return
        if self._outage.wait_seconds or self._presence.suspended:
            time.sleep(self._outage.wait_seconds or SUSPENDED_SECONDS)
        elif not self._stop.requested:
            self._wait(min(IDLE_SECONDS, self._talk.next_seconds))

    def _wait(self, seconds: float) -> None:
        try:
            self._talk.wait(seconds)
        except StoreUnavailable as error:
            if not self._stop.requested:  # being told to stop cuts a wait short
                self._outage.begin(error)

    def _hear(self, lost: Iterable[str], cancels: Iterable[str]) -> None:
        """Drop what is not ours any more: ended by RQ's own tools, or taken from a worker thought dead."""
        for job_id in lost:
            self._outbox.drop(job_id)
            self._forget(job_id)
        for job_id in cancels:
            self._cancel(job_id)

    def _cancel(self, job_id: str, attempt: int | None = None) -> None:
        running = self._running.get(job_id)
        if running is not None and attempt in (None, running.attempt):
            self._end(running, "cancelled")

    def _end(self, running: Running, reason: FinishReason) -> None:
        if running.ending is None:
            running.ending = reason
            self._engine.cancel(running.job_id, reason)

    def _forget(self, job_id: str) -> None:
        self._engine.drop(job_id)
        self._running.pop(job_id, None)

    def _leave(self) -> None:
        """Hand back what still runs, and say goodbye."""
        self._presence.sign()
        self._listen(patiently=True)
        running = [(running.job_id, running.attempt) for running in self._running.values()]
        self._talk.leave(self._outbox.draw(everything=True), running)

    @property
    def _state(self) -> str:
        if self._stop.requested:
            return "draining"
        if self._running:
            return "busy"
        return "suspended" if self._presence.suspended else "idle"

    def _vital(self) -> Vital:
        """What the lease is renewed with."""
        running = {job_id: running.attempt for job_id, running in self._running.items()}
        return Vital(state=self._state, holding={**self._outbox.settling, **running}, stats=self._count())

    def _count(self) -> Wire:
        """The engine's counters and the loop's own cost, for ``/metrics``."""
        stats = self._engine.stats
        return {
            "steps": stats.steps,
            "generated_tokens": stats.generated_tokens,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "preemptions": stats.preemptions,
            "step_seconds": round(stats.step_seconds, 3),
            "loop_seconds": round(self._cost, 3),
            "decode_rows": dict(stats.decode_rows),  # it grows while the talk goes on
        }
