"""The loop: claim → step → publish → settle, between two steps of one engine. Knows no Redis command and no model.

One thread does everything. The loop itself renews the lease and gives its parent signs of life, so a step that never
returns stops both.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from core.bounds import Wire
from core.errors import EngineChanged, HeadraceError, JobTimeout, StoreUnavailable
from core.protocol import EngineProtocol
from core.request import Emitted, Event, FinishedEvent, FinishReason, TokenEvent
from jobs.store import ClaimedJob, Store
from worker.outage import Every, Outage
from worker.outbox import Outbox
from worker.presence import Presence
from worker.running import Gate, Running
from worker.stop import Stop
from worker.upkeep import Upkeep

IDLE_SECONDS = 0.5  #: the longest an idle worker blocks: a job that stock RQ put in wakes nobody
LOOK_SECONDS = 0.2  #: after a claim that found no job, a worker that has others claims again, if no report tells of one
SUSPENDED_SECONDS = 0.25  #: between two looks whether ``rq resume`` was called


class Worker:
    """One engine, and the jobs in it."""

    def __init__(
        self,
        engine: EngineProtocol,
        store: Store,
        presence: Presence,
        upkeep: Upkeep,
        stop: Stop,
        report: Every,
    ) -> None:
        """Take the parts; ``report`` is when tokens may be sent while there are more to compute."""
        self._engine = engine
        self._store = store
        self._presence = presence
        self._upkeep = upkeep
        self._stop = stop
        self._clock = time.monotonic
        self._running: dict[str, Running] = {}  # in the order of their claims
        self._outbox = Outbox()
        self._report = report
        self._gate = Gate()
        self._outage = Outage(self._clock)
        self._more = False  # the last claim stopped before the queue's end
        self._look_at = 0.0  # claims not before, while something is computed
        self._started = self._clock()
        self._apart = 0.0  # seconds in step() or asleep: the rest is what the loop itself costs

    def run(self) -> None:
        """Claim, compute, report, until told to stop; then finish what was started, or hand it back.

        Raises:
            StoreUnavailable: Redis was away when we had to leave: leases run out, and results are computed again.
        """
        while self._going_on():
            self._presence.sign()
            self._talk()
            self._end_early()
            self._take(self._step())
            self._rest()
        self._leave()

    def _going_on(self) -> bool:
        unfinished = bool(self._running or self._outbox)
        return not self._stop.requested or (unfinished and not self._stop.overdue)

    def _talk(self) -> None:
        """Everything with Redis. While it is away nothing is claimed, and what happens stays in the outbox."""
        if self._outage.wait_seconds:
            return
        try:
            self._hear_report()
            self._renew()
            self._upkeep.do_if_due()
            self._claim()
            self._send_report()  # last, for Redis writes it to its disk while the next step is computed
        except StoreUnavailable as error:
            self._outage.begin(error)
            self._presence.hurry()  # a claim may have been done and its reply lost: the next beat tells
            self._report.hurry()  # what was not answered is sent again when Redis is back
        else:
            self._outage.end()

    def _hear_report(self) -> None:
        reported = self._outbox.hear()
        if reported.waiting:
            self._look_at = 0.0
        self._hear(reported.refused, reported.cancels)

    def _send_report(self) -> None:
        """Say what happened, if it is time: short steps share a report, while there is more to compute.

        Not beside a job whose worker died: should it die of that job again, all that the job had drawn is published,
        and the crash rule sees an attempt that got no further.
        """
        at_once = not self._running or any(running.crashes for running in self._running.values())
        if self._outbox and (at_once or self._report.due()):
            self._outbox.send(self._store)

    def _renew(self) -> None:
        """Renew the lease when it is time, and hear what became of our jobs."""
        running = {job_id: running.attempt for job_id, running in self._running.items()}
        beat = self._presence.beat(self._state, {**self._outbox.settling, **running}, self._count)
        if beat is not None:
            self._hear(beat.lost, beat.cancels)

    def _claim(self) -> None:
        """Take in what the engine has room for, without waiting for more."""
        self._more = False
        if self._stop.requested or self._presence.suspended or not self._gate.opens(self._running):
            return
        if (room := self._engine.room) > 0 and not (self._running and self._clock() < self._look_at):
            claim = self._store.claim(self._presence.name, self._engine.card, room, len(self._running))
            self._gate.note(claim)
            self._more = claim.more
            self._look_at = self._clock() + (0.0 if claim.jobs or claim.more else LOOK_SECONDS)
            for job in claim.jobs:
                self._start(job)

    def _start(self, job: ClaimedJob) -> None:
        """Put a claimed job into the engine; one that cannot be computed fails at once."""
        self._presence.sign()  # many long prompts take long to read
        try:
            if isinstance(job.request, HeadraceError):
                raise job.request
            self._engine.add(job.id, job.request, self._read_emitted(job))
        except StoreUnavailable:
            raise
        except HeadraceError as error:
            self._outbox.fail(job.id, job.attempt, error)
        else:
            self._running[job.id] = Running.start(job, self._clock())

    def _read_emitted(self, job: ClaimedJob) -> tuple[Emitted, ...]:
        """What earlier attempts have published, by choice.

        Raises:
            EngineChanged: by an engine with another vocabulary; the submitter said that any may go on.
        """
        if job.next_event <= 1:
            return ()
        emitted = self._store.emitted(job.id)
        if any(token_id >= self._engine.card.vocab_size for choice in emitted for token_id in choice.token_ids):
            raise EngineChanged(self._engine.card.identity)
        return emitted

    def _end_early(self) -> None:
        """Obey stop commands, deadlines and time-outs: the next step ends those jobs with what they have."""
        for command in self._presence.stop_commands():
            self._cancel(command.job_id, command.attempt)
        now = self._clock()
        for running in list(self._running.values()):
            if now >= running.timeout_at:
                self._outbox.fail(running.job_id, running.attempt, JobTimeout(running.timeout_seconds))
                self._forget(running.job_id)
            elif now >= running.deadline_at:
                self._end(running, "deadline")

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
                self._outbox.fail(running.job_id, running.attempt, event.error)

    def _rest(self) -> None:
        """With nothing to compute and nothing to report, block until a job may be there."""
        if self._running or (not self._outage.wait_seconds and (self._outbox or self._more)):
            return
        start = self._clock()
        if self._outage.wait_seconds or self._presence.suspended:
            time.sleep(self._outage.wait_seconds or SUSPENDED_SECONDS)
        elif not self._stop.requested:
            self._wait(min(IDLE_SECONDS, self._upkeep.next_seconds, self._presence.next_beat_seconds))
        self._apart += self._clock() - start

    def _wait(self, seconds: float) -> None:
        try:
            self._store.wait(seconds)
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
        """Hand back what still runs, in its order and with its tokens, and say goodbye."""
        self._presence.sign()
        self._hear_report()
        self._outbox.send(self._store)
        self._hear_report()
        self._store.release([(running.job_id, running.attempt) for running in self._running.values()])
        self._presence.leave()

    @property
    def _state(self) -> str:
        if self._stop.requested:
            return "draining"
        if self._running:
            return "busy"
        return "suspended" if self._presence.suspended else "idle"

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
            "loop_seconds": round(self._clock() - self._started - self._apart, 3),
            "decode_rows": stats.decode_rows,
        }
