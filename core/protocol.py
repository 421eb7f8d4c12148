"""What every engine can do: the torch one, the instant one, vLLM's. Standard library only.

What only some can do stands on the card (``kinds``, ``abilities``); ``tests/test_conformance.py`` holds each to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from core.card import ModelCard
from core.request import Emitted, Event, FinishReason, Request


@dataclass(slots=True, eq=False)
class EngineStats:
    """Counted since the engine was made; written by the engine, read by the worker's beat."""

    steps: int = 0
    prompt_tokens: int = 0  #: passed through the model as part of a prompt
    generated_tokens: int = 0
    cached_tokens: int = 0  #: of prompts, that did not pass through it because their keys were known
    preemptions: int = 0  #: sequences that gave their blocks back, to read their tokens again later
    step_seconds: float = 0.0  #: spent inside ``step()``
    decode_rows: dict[int, int] = field(default_factory=dict)  #: sequences that drew a token in a step -> steps


class EngineProtocol(Protocol):
    """One loaded model that computes many jobs at once; used from one thread only."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def room(self) -> int:
        """How many more sequences it can take now; 0 while it has enough work and memory is spoken for.

        A job has one for each of its choices. One with more than there is room for is taken all the same: those that
        find no place wait for one.
        """
        ...

    @property
    def idle(self) -> bool:
        """Nothing to compute: ``step`` would return no event."""
        ...

    def add(self, job_id: str, request: Request, emitted: tuple[Emitted, ...] = ()) -> None:
        """Take a job in; its first event comes with a later ``step``, its last once all its choices have ended.

        Args:
            emitted: tokens that earlier attempts have published, by choice; nothing for those it is too short for.
                They are read, not published again, and count towards ``max_tokens``; what follows is what those
                attempts would have drawn, and nothing in a choice that had ended.

        Raises:
            RequestError: too long, unsupported, ids outside the vocabulary …; the engine is as before.
        """
        ...

    def cancel(self, job_id: str, reason: FinishReason = "cancelled") -> None:
        """End a job: the next ``step`` returns its FinishedEvent with what there is. Unknown ids are ignored."""
        ...

    def drop(self, job_id: str) -> None:
        """Forget a job that is not ours any more: no event follows. Unknown ids are ignored."""
        ...

    def step(self) -> list[Event]:
        """Compute one step for all jobs that fit, and return what happened, in order.

        Where not all fit, those of a lower ``Request.priority`` go before others; nobody who runs waits for that.
        """
        ...
