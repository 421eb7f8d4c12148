"""Hands out cache slots in runs of whole blocks. Lists and integers only: runs on any laptop.

A run is contiguous, so that a sequence's keys are one view of the pool and attention never gathers them. The price is
that a run is as long as its sequence may become, from the first day; what that saves is pre-emption and block tables.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

BLOCK_TOKENS = 16  #: slots of one block


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring cache slots that belong to one sequence."""

    start: int  #: the first slot
    tokens: int  #: how many; a multiple of BLOCK_TOKENS


class BlockPool:
    """All cache slots of one engine.

    Invariant: ``_free`` is sorted by start, its runs do not touch, and they and the runs handed out are the whole pool.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens // BLOCK_TOKENS * BLOCK_TOKENS  #: slots altogether
        self._free = [Run(0, self.tokens)] if self.tokens else []

    @property
    def free_tokens(self) -> int:
        """Slots that no sequence has."""
        return sum(run.tokens for run in self._free)

    def allocate(self, tokens: int) -> Run | None:
        """Take the first free run that holds ``tokens`` slots; None while there is none."""
        wanted = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        for number, run in enumerate(self._free):
            if run.tokens < wanted:
                continue
            rest = Run(run.start + wanted, run.tokens - wanted)
            self._free[number : number + 1] = [rest] if rest.tokens else []
            return Run(run.start, wanted)
        return None

    def free(self, run: Run) -> None:
        """Give a run back, and join it with free neighbours."""
        number = bisect.bisect(self._free, run.start, key=lambda free: free.start)
        first, last = number, number
        start, end = run.start, run.start + run.tokens
        if number and self._free[number - 1].start + self._free[number - 1].tokens == start:
            first, start = number - 1, self._free[number - 1].start
        if number < len(self._free) and self._free[number].start == end:
            last, end = number + 1, end + self._free[number].tokens
        self._free[first:last] = [Run(start, end - start)]
