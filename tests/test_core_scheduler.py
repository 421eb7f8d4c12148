"""Slots never overlap, budgets hold, everybody finishes, and nobody reads another's keys."""

from __future__ import annotations

import random

import pytest
import torch

from core.answer import Answer, NoText
from core.batch import Batch, build_batch
from core.blocks import BLOCK_TOKENS, BlockPool, Run
from core.request import Request, SamplingParams
from core.scheduler import Scheduler, Step
from core.sequence import Sequence


class FakeCache:
    """Remembers who wrote each slot, so a test can prove nobody reads another's keys."""

    def __init__(self, slots: int) -> None:
        self._slots: list[tuple[str, int] | None] = [None] * slots

    def write(self, step: Step, batch: Batch) -> None:
        names = [(piece.sequence.job_id, at) for piece in step.slices for at in range(piece.begin, piece.end)]
        for slot, name in zip(batch.slots.tolist(), names, strict=True):
            self._slots[slot] = name

    def read(self, step: Step, batch: Batch) -> None:
        for piece, span in zip(step.slices, batch.spans, strict=True):
            seen = self._slots[span.start : span.start + span.context]
            assert seen == [(piece.sequence.job_id, at) for at in range(piece.end)]


def sequence_of(name: str, prompt: int, answer: int) -> Sequence:
    request = Request(token_ids=(1,) * prompt, params=SamplingParams(max_tokens=max(1, answer)))
    return Sequence(name, request, [1] * prompt, prompt, prompt + answer, 0, Answer(NoText()))


@pytest.mark.parametrize("seed", range(60))
def test_any_mix_of_jobs_finishes_within_budget_and_frees_every_slot(seed: int) -> None:
    draw = random.Random(seed)
    pool = BlockPool(draw.randint(8, 40) * BLOCK_TOKENS)
    budget, most = draw.randint(1, 30), draw.randint(1, 6)
    scheduler, cache = Scheduler(pool, max_running=most), FakeCache(pool.tokens)
    waiting = [sequence_of(str(n), draw.randint(1, 60), draw.randint(1, 40)) for n in range(12)]
    alive: list[Sequence] = []
    for _ in range(5000):
        if waiting and draw.random() < 0.4:
            alive.append(waiting.pop())
            scheduler.add(alive[-1])
        if alive and draw.random() < 0.02:
            scheduler.remove(alive.pop(draw.randrange(len(alive))))  # cancelled
        step = scheduler.plan(budget)
        assert step.tokens <= budget
        assert len(scheduler.running) <= most
        assert bool(step.slices) == bool(alive)  # nobody starves: somebody always moves
        if step.slices:
            batch = build_batch(step, torch.device("cpu"))
            cache.write(step, batch)
            cache.read(step, batch)
        for piece in step.slices:
            assert (piece.begin, piece.end <= len(piece.sequence.tokens)) == (piece.sequence.computed, True)
            completes, piece.sequence.computed = piece.completes, piece.end
            if completes:
                piece.sequence.accept(1)
            if piece.sequence.ended:
                scheduler.remove(piece.sequence)
                alive.remove(piece.sequence)
        if not waiting and not alive:
            break

    assert not waiting
    assert not alive
    assert pool.free_tokens == pool.tokens


def test_those_that_decode_go_first_and_prompts_share_the_rest_in_order() -> None:
    scheduler = Scheduler(BlockPool(1024), max_running=8)
    old, decoding, late = sequence_of("old", 30, 5), sequence_of("decoding", 1, 5), sequence_of("late", 30, 5)
    for sequence in (old, decoding, late):
        scheduler.add(sequence)

    [first, second] = scheduler.plan(10).slices

    assert (first.sequence, first.tokens) == (decoding, 1)
    assert (second.sequence, second.tokens) == (old, 9)


def test_a_long_job_that_waits_for_memory_is_not_overtaken() -> None:
    scheduler = Scheduler(BlockPool(10 * BLOCK_TOKENS), max_running=8)
    first, long, short = sequence_of("first", 60, 60), sequence_of("long", 60, 60), sequence_of("short", 5, 5)
    for sequence in (first, long, short):
        scheduler.add(sequence)
    assert (scheduler.running, list(scheduler.waiting), scheduler.room) == ([first], [long, short], 0)

    scheduler.remove(first)

    assert scheduler.running == [long, short]
    assert scheduler.room == 6


@pytest.mark.parametrize("seed", range(100))
def test_runs_never_overlap_and_join_again_when_freed(seed: int) -> None:
    draw = random.Random(seed)
    pool, held = BlockPool(64 * BLOCK_TOKENS + 7), list[Run]()
    for _ in range(300):
        if draw.random() < 0.55:
            wanted = draw.randint(1, 10 * BLOCK_TOKENS)
            run = pool.allocate(wanted)
            if run is not None:
                assert run.tokens >= wanted
                assert run.start + run.tokens <= pool.tokens
                assert all(run.start >= h.start + h.tokens or h.start >= run.start + run.tokens for h in held)
                held.append(run)
        elif held:
            pool.free(held.pop(draw.randrange(len(held))))
        assert pool.free_tokens + sum(run.tokens for run in held) == pool.tokens
    for run in held:
        pool.free(run)

    assert pool.allocate(pool.tokens) == Run(0, pool.tokens)
