"""Waiting and running sequences → the next Step. Lists and integers only: no tensor, no text, no clock.

There is no prefill phase and no decode phase: each sequence has tokens it knows and tokens it has computed, and a step
lets computed catch up with known, within a budget.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from core.blocks import BlockPool
from core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens ``begin`` to ``end`` of one sequence pass through the model."""

    sequence: Sequence
    begin: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.begin

    @property
    def completes(self) -> bool:
        """Its last token is the last one known: the next can be drawn."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the model: the slices chosen."""

    slices: tuple[Slice, ...]

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.slices)

    def halves(self) -> tuple[Step, Step]:
        """The same tokens as two steps, to be computed one after the other."""
        first, second, left = [], [], self.tokens // 2
        for piece in self.slices:
            cut = piece.begin + min(piece.tokens, left)
            left -= cut - piece.begin
            if cut > piece.begin:
                first.append(Slice(piece.sequence, piece.begin, cut))
            if cut < piece.end:
                second.append(Slice(piece.sequence, cut, piece.end))
        return Step(tuple(first)), Step(tuple(second))

    def still_running(self) -> Step:
        """Without the slices of sequences that were removed since it was planned."""
        return Step(tuple(piece for piece in self.slices if piece.sequence.run is not None))


class Scheduler:
    """Who is computed next.

    Invariant: a sequence runs exactly while it has a run of cache slots; both are given and taken together. The choices
    of a job are sequences like any other: they need not run at once.
    """

    def __init__(self, pool: BlockPool, *, max_running: int) -> None:
        self._pool = pool
        self._max_running = max_running
        self.waiting: deque[Sequence] = deque()  #: in the order of arrival, without cache slots
        self.running: list[Sequence] = []  #: in the order of admission

    @property
    def room(self) -> int:
        """Sequences that can be taken now; 0 while one waits for memory."""
        return 0 if self.waiting else max(0, self._max_running - len(self.running))

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; it runs at once if there is a place and memory, and nobody waits before it."""
        self.waiting.append(sequence)
        self.admit()

    def admit(self) -> None:
        """Let waiting sequences run, strictly in order: a long one is not starved by shorter ones behind it."""
        while self.waiting and len(self.running) < self._max_running:
            run = self._pool.allocate(self.waiting[0].most_tokens)
            if run is None:
                return
            sequence = self.waiting.popleft()
            sequence.run = run
            self.running.append(sequence)

    def remove(self, *sequences: Sequence) -> None:
        """Forget sequences and free their slots; what waited for them may run."""
        for sequence in sequences:
            if sequence.run is None:
                self.waiting.remove(sequence)
            else:
                self.running.remove(sequence)
                self._pool.free(sequence.run)
                sequence.run = None
        self.admit()

    def plan(self, budget: int) -> Step:
        """Choose the next step: one token of every sequence that decodes, then slices of prompts in order of admission.

        A sequence that decodes waits only when more of them run than the budget has tokens; those admitted first go
        first.

        Args:
            budget: tokens of the step, at most.
        """
        slices = []
        for sequence in sorted(self.running, key=lambda running: running.pending > 1):  # stable: keeps the order
            tokens = min(budget, sequence.pending)
            if tokens:
                slices.append(Slice(sequence, sequence.computed, sequence.computed + tokens))
                budget -= tokens
        return Step(tuple(slices))
