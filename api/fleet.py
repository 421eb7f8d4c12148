"""Who is there to compute, and how fast: workers, models and queue, asked for at most once a second. Knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from api.errors import NoWorker
from core.card import ModelCard
from core.errors import ModelNotFound, UnsupportedRequest
from core.request import Request
from jobs.async_store import AsyncStore
from jobs.job import Job
from jobs.remembered import Remembered
from jobs.reports import QueueReport, ServerReport, WorkerCard

MAX_ETA_SECONDS = 7 * 86_400.0


class Fleet:
    """The workers and their models, as old as a second."""

    def __init__(self, store: AsyncStore, own_model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._own_model = own_model
        self._workers = Remembered[Sequence[WorkerCard]](lambda: store.workers(), 1.0, clock)
        self._queue = Remembered[QueueReport](lambda: store.queue(), 1.0, clock)
        self._server = Remembered[ServerReport](lambda: store.inspect(), 1.0, clock)
        self._known = Remembered[Sequence[ModelCard]](lambda: store.known(), 5.0, clock)

    async def workers(self) -> Sequence[WorkerCard]:
        """Those with a live lease."""
        return await self._workers.get()

    async def queue(self) -> QueueReport:
        return await self._queue.get()

    async def server(self) -> ServerReport:
        """The Redis behind it all.

        Raises:
            UnsafeServer, StoreUnavailable
        """
        return await self._server.get()

    async def live(self) -> Mapping[str, ModelCard]:
        """The models of live workers, by name."""
        return {worker.model.name: worker.model for worker in await self.workers() if worker.model is not None}

    async def settle(self, asked: str | None) -> str | None:
        """The name a job is to carry: as workers spell it, the server's own where none is asked for.

        Returns:
            None: any worker may take it.

        Raises:
            ModelNotFound: no worker serves it; or none is alive and none ever served it.
        """
        live = await self.live()
        if asked is None:
            return _only(live, self._own_model)
        if live:
            return _spelled(asked, live, f"no worker serves it; served now: {', '.join(sorted(live))}")
        known = [card.name for card in await self._known.get()]
        return _spelled(asked, [*known, self._own_model], "no worker is alive, and none ever served it")

    async def refuse_unable(self, request: Request) -> None:
        """Raise ``UnsupportedRequest`` where no live worker that may take the request can do what it asks for."""
        refusals = []
        for worker in await self.workers():
            if (card := worker.model) is None or request.model not in (None, card.name):
                continue
            try:
                card.refuse(request)
            except UnsupportedRequest as error:
                refusals.append(error)
            else:
                return
        if refusals:
            raise refusals[0]

    async def card(self, asked: str | None) -> ModelCard:
        """What the model takes.

        Raises:
            ModelNotFound, NoWorker
        """
        name = await self.settle(asked)
        cards = await self.live() or {card.name: card for card in await self._known.get()}
        name = name or _only(cards, self._own_model) or next(iter(sorted(cards)), None)
        if name is None or name not in cards:
            raise NoWorker
        return cards[name]

    async def eta_seconds(self, job: Job) -> float | None:
        """When the job's turn may come, from its position and the recent rate of completions; None when unknown."""
        if job.queue_position is None:
            return None
        rate = (await self.queue()).completions_per_second
        if not rate or rate <= 0:
            return None
        return round(min(job.queue_position / rate, MAX_ETA_SECONDS), 1)


def _only(cards: Mapping[str, ModelCard], own: str) -> str | None:
    """The server's own model if it is among ``cards``, else the only one there is."""
    for name in cards:
        if name.casefold() == own.casefold() or len(cards) == 1:
            return name
    return None


def _spelled(asked: str, names: Sequence[str] | Mapping[str, ModelCard], otherwise: str) -> str:
    for name in names:
        if name.casefold() == asked.casefold():
            return name
    raise ModelNotFound(asked, otherwise)
