"""The courier's rounds: collect, deliver many at once, note how each went, until told to stop."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from core.errors import StoreError
from courier.post import Answer, Poster
from courier.settings import LONGEST_PAUSE_SECONDS
from jobs.outbox import Callback, Outbox

log = logging.getLogger("headrace.courier")

AT_ONCE = 32  #: deliveries under way
LOOK_SECONDS = 0.25  #: between two looks into an empty outbox
AWAY_SECONDS = 1.0  #: between two looks for a Redis that is away
LEASE_MARGIN_SECONDS = 5.0  #: on top of an attempt's own time; then another courier may try
JITTER = 0.2  #: of each pause, both ways
PROBLEM = "the receiver did not answer with success"  #: the one text that clients see


class Courier:
    """One of perhaps several; what one of them leaves undone when it dies, another does after the lease."""

    def __init__(self, outbox: Outbox, poster: Poster, timeout_seconds: float, pauses: Sequence[float]) -> None:
        """``pauses``: seconds behind the first failed attempt, the second …; behind the last it is given up."""
        self._outbox = outbox
        self._poster = poster
        self._lease_seconds = timeout_seconds + LEASE_MARGIN_SECONDS
        self._pauses = pauses
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until ``stop``; then finish what is under way, which no attempt's time outlasts."""
        stopping = asyncio.create_task(stop.wait())
        while not stop.is_set():
            pause = LOOK_SECONDS
            try:
                for callback in await self._outbox.collect(self._lease_seconds, AT_ONCE - len(self._under_way)):
                    self._start(callback)
                    pause = 0.0
            except StoreError as error:
                log.warning("%s; callbacks wait", error)
                pause = AWAY_SECONDS
            if len(self._under_way) == AT_ONCE:
                await asyncio.wait({stopping, *self._under_way}, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.wait({stopping}, timeout=pause)
        if self._under_way:
            await asyncio.wait(self._under_way)

    def _start(self, callback: Callback) -> None:
        task = asyncio.create_task(self._deliver(callback))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _deliver(self, callback: Callback) -> None:
        # More tries than there are pauses: the courier of the last one died.
        spent = callback.tries > len(self._pauses) + 1
        answer = Answer(gone=True, why="no try left") if spent else await self._poster.send(callback)
        try:
            await self._note(callback, answer)
        except StoreError as error:
            log.warning("%s: %s; it is sent again after its lease", callback.id, error)

    async def _note(self, callback: Callback, answer: Answer) -> None:
        where = f"{callback.id} of {callback.job_id}, attempt {callback.attempt}"
        if answer.delivered:
            await self._outbox.delivered(callback)
            log.info("%s: delivered", where)
            return
        pause = None if answer.gone else self._pause(callback.tries, answer)
        await self._outbox.failed(callback, PROBLEM, pause)
        then = "given up" if pause is None else f"again in {pause:.0f} s"
        log.warning("%s: not delivered (%s); %s", where, answer.why, then)

    def _pause(self, tries: int, answer: Answer) -> float | None:
        """Seconds until the next try; None: there is none."""
        if tries > len(self._pauses):
            return None
        pause = self._pauses[tries - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        return min(max(pause, answer.retry_after_seconds), LONGEST_PAUSE_SECONDS)
