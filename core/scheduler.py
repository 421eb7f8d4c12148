"""Waiting and running sequences → the next Step. Lists and integers only: no tensor, no text, no clock.

There is no prefill phase and no decode phase: each sequence has tokens it knows and tokens it has computed, and a step
lets computed catch up with known, within a budget of tokens and a pool of cache blocks.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from core.blocks import BLOCK_TOKENS, BlockPool, blocks_of
from core.protocol import EngineStats
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
    """One pass of the model: the slices chosen, and which blocks are copied before."""

    slices: tuple[Slice, ...]
    copies: tuple[tuple[int, int], ...] = ()  #: of whole blocks, from and to, one after the other

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
        return Step(tuple(first), self.copies), Step(tuple(second))

    def still_running(self) -> Step:
        """Without the slices of sequences that were removed since it was planned."""
        return Step(tuple(piece for piece in self.slices if piece.sequence.running), self.copies)


def shares(running: Iterable[Sequence], budget: int) -> dict[Sequence, int]:
    """Who gets how many tokens of a step: one for each that decodes, in order of admission, the rest for prompts.

    Of that rest the prompt admitted first has half, and the others what they need, the shortest first: neither do short
    prompts wait for a long one, nor does a long one wait for all the short ones that come.
    """
    granted: dict[Sequence, int] = {}
    reading = []
    for sequence in running:
        if sequence.pending > 1:
            reading.append(sequence)
        elif sequence.pending and budget:
            granted[sequence] = 1
            budget -= 1
    if reading and budget:
        granted[reading[0]] = min(reading[0].pending, -(-budget // 2))
        budget -= granted[reading[0]]
    for sequence in sorted(reading, key=lambda sequence: sequence.pending):
        more = min(budget, sequence.pending - granted.get(sequence, 0))
        if more:
            granted[sequence] = granted.get(sequence, 0) + more
            budget -= more
    return granted


class Scheduler:
    """Who is computed next.

    Invariant: only running sequences have blocks, and blocks that two of them have are written by neither. The choices
    of a job are sequences like any other: they need not run at once. Where blocks run out, the least urgent one gives
    his back, of those the one admitted last, and reads his tokens again later; the most urgent one, of those the one
    admitted first, always goes on, as none grows past the pool. Nobody who runs is stopped for somebody who waits.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, prefix_cache: bool = True) -> None:
        self._pool = pool
        self._max_running = max_running
        self._prefix_cache = prefix_cache
        self._slices: dict[Sequence, Slice] = {}  #: of the step that is being planned
        self._copies: list[tuple[int, int]] = []
        self.stats = EngineStats()  #: the engine counts here, too
        self.waiting: list[Sequence] = []  #: by priority, and then in the order of arrival; without blocks
        self.running: list[Sequence] = []  #: in the order of admission

    @property
    def room(self) -> int:
        """Sequences that can be taken now; 0 while one waits for memory."""
        return 0 if self.waiting else max(0, self._max_running - len(self.running))

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; it runs at once if there is a place and memory, and nobody waits before it."""
        bisect.insort_right(self.waiting, sequence, key=_priority)
        self.admit()

    def admit(self) -> None:
        """Let waiting sequences run, strictly in order: a long one is not starved by shorter ones behind it.

        A sequence is admitted when the tokens it knows find blocks and each that runs could still have one more.
        """
        while self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            found = self._find(sequence)
            self._pool.share(found)  # now they are not free any more
            wanted = 0 if _leader(sequence) else blocks_of(len(sequence.tokens)) - len(found)
            if self.running and wanted + len(self.running) > self._pool.free_blocks:
                self._pool.give(reversed(found))
                return
            self.waiting.pop(0)
            sequence.running, sequence.blocks = True, found + self._pool.take(wanted)
            sequence.computed = len(found) * BLOCK_TOKENS
            if sequence.cached is None:
                self._count_cached(sequence)
            self.running.append(sequence)

    def remove(self, *sequences: Sequence) -> None:
        """Forget sequences and free their blocks; what waited for them may run."""
        for sequence in sequences:
            if sequence.running:
                self._stop(sequence)
            else:
                self.waiting.remove(sequence)
        self.admit()

    def plan(self, budget: int) -> Step:
        """Choose the next step.

        Args:
            budget: tokens of the step, at most.
        """
        self._slices, self._copies = {}, []
        for sequence, tokens in shares(self._able(), budget).items():
            if sequence.running and self._reserve(sequence, sequence.computed + tokens):
                self._slices[sequence] = Slice(sequence, sequence.computed, sequence.computed + tokens)
        return Step(tuple(self._slices.values()), tuple(self._copies))

    def advance(self, piece: Slice) -> None:
        """A slice has passed through the model: what it filled can be found by others."""
        sequence = piece.sequence
        sequence.computed = piece.end
        if self._prefix_cache:
            first, full = piece.begin // BLOCK_TOKENS, piece.end // BLOCK_TOKENS
            digests = sequence.digests(full) if full > first else []
            for number in range(first, full):
                self._pool.remember(sequence.blocks[number], digests[number])

    def _find(self, sequence: Sequence) -> list[int]:
        """Known blocks that a sequence begins with."""
        if not self._prefix_cache:
            return []
        return self._pool.find(sequence.digests(sequence.reusable // BLOCK_TOKENS))

    def _able(self) -> list[Sequence]:
        """Who can be computed, in order of admission: none whose next tokens somebody else is reading right now.

        Of those that begin alike the one with the least to read goes on, so nobody waits for one that is served later.
        """
        begun: set[bytes] = set()
        able = set()
        for sequence in sorted(self.running, key=lambda sequence: sequence.pending):
            if self._follow(sequence) and self._reads_alone(sequence, begun):
                able.add(sequence)
        return [sequence for sequence in self.running if sequence in able]

    def _reads_alone(self, sequence: Sequence, begun: set[bytes]) -> bool:
        """Whether nobody is reading the block that a prompt comes to next; known ones are taken over on the way.

        Args:
            begun: blocks being read; its own is added.
        """
        if not self._prefix_cache or sequence.pending < 2:
            return True
        while True:
            number = sequence.computed // BLOCK_TOKENS
            end = (number + 1) * BLOCK_TOKENS
            if end > len(sequence.tokens):
                return True
            digest = sequence.digests(number + 1)[number]
            found = self._pool.find([digest]) if end <= sequence.reusable else []
            if not found:
                break
            self._take_over(sequence, number, found[0])
        if digest in begun:
            return end > sequence.reusable
        begun.add(digest)
        return True

    def _take_over(self, sequence: Sequence, number: int, found: int) -> None:
        """Let a block that somebody else has filled stand for one of its own."""
        end = (number + 1) * BLOCK_TOKENS
        self._pool.share([found])
        self._pool.give(sequence.blocks[number : number + 1])
        sequence.blocks[number : number + 1] = [found]
        if sequence.cached == sequence.computed:  # it has read nothing itself
            sequence.computed = end
            self.stats.cached_tokens -= sequence.cached
            self._count_cached(sequence)
        sequence.computed = end

    def _follow(self, sequence: Sequence) -> bool:
        """Whether it can be computed; a further choice of a job takes over the prompt that the first one read."""
        leader = _leader(sequence)
        if leader is None or sequence.computed:
            return True
        shared = sequence.prompt_tokens - 1
        if leader.computed < shared:
            return False
        sequence.blocks = leader.blocks[: blocks_of(shared)]
        sequence.computed = shared
        self._pool.share(sequence.blocks)
        self._count_cached(sequence)
        return True

    def _reserve(self, sequence: Sequence, end: int) -> bool:
        """Have blocks that only this sequence writes, up to a token; whether that could be done without its own."""
        first = sequence.computed // BLOCK_TOKENS
        while sequence.running:
            copied = first < len(sequence.blocks) and self._pool.is_shared(sequence.blocks[first])
            missing = max(0, blocks_of(end) - len(sequence.blocks))
            if missing + copied <= self._pool.free_blocks:
                if copied:
                    self._copy(sequence, first)
                sequence.blocks += self._pool.take(missing)
                return True
            self._preempt(max(reversed(self.running), key=_priority))
        return False

    def _count_cached(self, sequence: Sequence) -> None:
        sequence.cached = min(sequence.computed, sequence.prompt_tokens)
        self.stats.cached_tokens += sequence.cached

    def _copy(self, sequence: Sequence, number: int) -> None:
        """Copy on write."""
        shared, [own] = sequence.blocks[number], self._pool.take(1)
        self._copies.append((shared, own))
        sequence.blocks[number] = own
        self._pool.give([shared])

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks away; it waits before all others of its priority, and reads its tokens again."""
        self._slices.pop(sequence, None)
        self._stop(sequence)
        bisect.insort_left(self.waiting, sequence, key=_priority)
        self.stats.preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._pool.give(reversed(sequence.blocks))
        sequence.running, sequence.computed, sequence.blocks = False, 0, []


def _priority(sequence: Sequence) -> int:
    return sequence.request.priority


def _leader(sequence: Sequence) -> Sequence | None:
    """Whose prompt a sequence shares: that of its job's first choice, while that one runs."""
    leader = sequence.leader
    return leader if leader is not None and leader.running and sequence.prompt_tokens > 1 else None
