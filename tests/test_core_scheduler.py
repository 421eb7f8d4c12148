"""Slots never overlap, budgets hold, everybody finishes, and nobody reads another's keys."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from core.answer import Answer, NoText
from core.batch import Batch, build_batch
from core.blocks import BLOCK_TOKENS, BlockPool
from core.request import Request, SamplingParams
from core.scheduler import Scheduler, Step
from core.sequence import Sequence


class FakeCache:
    """Remembers the text that each slot was written for, so a test can prove that nobody reads another's keys."""

    def __init__(self, slots: int) -> None:
        self._slots: list[tuple[int, ...] | None] = [None] * slots

    def compute(self, step: Step, batch: Batch) -> None:
        for source, target in batch.copies:
            into = slice(target * BLOCK_TOKENS, (target + 1) * BLOCK_TOKENS)
            self._slots[into] = self._slots[source * BLOCK_TOKENS : (source + 1) * BLOCK_TOKENS]
        texts = [tuple(p.sequence.tokens[: at + 1]) for p in step.slices for at in range(p.begin, p.end)]
        assert len(set(batch.slots.tolist())) == len(texts), "two wrote one slot"
        for slot, text in zip(batch.slots.tolist(), texts, strict=True):
            self._slots[slot] = text
        for piece, span in zip(step.slices, batch.spans, strict=True):
            table = batch.tables[span.table :].tolist()
            seen = [
                self._slots[table[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS] for at in range(span.context)
            ]
            assert seen == [tuple(piece.sequence.tokens[: at + 1]) for at in range(piece.end)]


def sequence_of(
    name: str, prompt: int, answer: int, *, token: int = 1, leader: Sequence | None = None, priority: int = 0
) -> Sequence:
    params = SamplingParams(max_tokens=max(1, answer))
    request = Request(token_ids=(token,) * prompt, params=params, priority=priority)
    return Sequence(
        name,
        request,
        [token] * prompt,
        prompt,
        prompt + answer,
        0,
        Answer(NoText()),
        index=int(leader is not None),
        leader=leader,
    )


@pytest.mark.parametrize("seed", range(80))
def test_any_mix_of_jobs_finishes_within_budget_and_frees_every_block(seed: int) -> None:
    """Texts that begin alike, choices that share a prompt, priorities, pools too small for all, and cancellations."""
    draw = random.Random(seed)
    pool = BlockPool(draw.randint(7, 40) * BLOCK_TOKENS)
    budget, most = draw.randint(1, 30), draw.randint(1, 6)
    scheduler = Scheduler(pool, max_running=most, prefix_cache=draw.random() < 0.8)
    cache, waiting, alive = FakeCache(pool.tokens), list[Sequence](), list[Sequence]()
    for number in range(12):
        shape = draw.randint(1, 60), draw.randint(1, 40)
        token, priority = draw.randint(1, 2), draw.choice((0, 0, -5, 7)) * (seed % 2)
        first = sequence_of(str(number), *shape, token=token, priority=priority)
        others = [
            sequence_of(str(number), *shape, token=token, leader=first, priority=priority)
            for _ in range(draw.choice((0, 0, 2)))
        ]
        waiting += [*others, first]
    for _ in range(5000):
        if waiting and draw.random() < 0.4:
            alive.append(waiting.pop())
            scheduler.add(alive[-1])
        if alive and draw.random() < 0.02:
            scheduler.remove(alive.pop(draw.randrange(len(alive))))  # cancelled
        stopped = scheduler.stats.preemptions
        step = scheduler.plan(budget)
        assert step.tokens <= budget
        assert len(scheduler.running) <= most
        assert bool(step.slices) == bool(alive) or scheduler.stats.preemptions > stopped  # nobody starves: all moves
        order = [sequence.request.priority for sequence in scheduler.waiting]
        assert order == sorted(order)
        if step.slices:
            cache.compute(step, build_batch(step, torch.device("cpu")))
        for piece in step.slices:
            assert (piece.begin, piece.end <= len(piece.sequence.tokens)) == (piece.sequence.computed, True)
            scheduler.advance(piece)
            if piece.completes:
                piece.sequence.accept(draw.randint(1, 2))
            if piece.sequence.ended:
                scheduler.remove(piece.sequence)
                alive.remove(piece.sequence)
        if not waiting and not alive:
            break

    assert not waiting
    assert not alive
    assert pool.free_blocks == pool.blocks


def test_those_that_decode_go_first_and_prompts_share_the_rest_in_order() -> None:
    scheduler = Scheduler(BlockPool(1024), max_running=8)
    old, decoding, late = sequence_of("old", 30, 5), sequence_of("decoding", 1, 5), sequence_of("late", 30, 5)
    for sequence in (old, decoding, late):
        scheduler.add(sequence)

    [first, second] = scheduler.plan(10).slices

    assert (first.sequence, first.tokens) == (decoding, 1)
    assert (second.sequence, second.tokens) == (old, 9)


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_a_long_one_for_many_short_ones() -> None:
    scheduler = Scheduler(BlockPool(4096), max_running=8)
    long, short = sequence_of("long", 900, 5), sequence_of("short", 30, 5, token=2)
    shorter = sequence_of("shorter", 10, 5)
    for sequence in (long, short, shorter):
        scheduler.add(sequence)

    tokens = {piece.sequence.job_id: piece.tokens for piece in scheduler.plan(40).slices}

    assert tokens == {"long": 20, "shorter": 10, "short": 10}


def test_a_long_job_that_waits_for_memory_is_not_overtaken() -> None:
    scheduler = Scheduler(BlockPool(10 * BLOCK_TOKENS), max_running=8)
    first, long, short = (
        sequence_of("first", 100, 20),
        sequence_of("long", 100, 20, token=2),
        sequence_of("short", 5, 5),
    )
    for sequence in (first, long, short):
        scheduler.add(sequence)
    assert (scheduler.running, list(scheduler.waiting), scheduler.room) == ([first], [long, short], 0)

    scheduler.remove(first)

    assert scheduler.running == [long, short]
    assert scheduler.room == 6


def read(scheduler: Scheduler, budget: int = 1000) -> Step:
    """One step, all of it computed."""
    step = scheduler.plan(budget)
    for piece in step.slices:
        scheduler.advance(piece)
        if piece.completes:
            piece.sequence.accept(3)
    return step


def test_a_text_that_begins_like_an_earlier_one_reads_only_the_rest() -> None:
    scheduler = Scheduler(BlockPool(1024), max_running=8)
    earlier = sequence_of("earlier", 40, 5)
    scheduler.add(earlier)
    read(scheduler)
    scheduler.remove(earlier)
    again = sequence_of("again", 40, 5)
    scheduler.add(again)

    [piece] = read(scheduler).slices

    assert (piece.begin, piece.end, again.cached) == (32, 40, 32)


def test_of_those_that_begin_alike_one_reads_and_the_others_take_over_what_it_has_read() -> None:
    scheduler = Scheduler(BlockPool(4096), max_running=8)
    alike = [sequence_of(name, 40, 5) for name in ("first", "second")]
    longer = sequence_of("longer", 40, 5)
    longer.tokens += [2] * 30
    for sequence in (longer, *alike):
        scheduler.add(sequence)

    assert [(piece.sequence, piece.begin, piece.end) for piece in read(scheduler, 20).slices] == [(alike[0], 0, 20)]
    steps = [[(piece.sequence, piece.begin, piece.end) for piece in read(scheduler, 60).slices] for _ in range(2)]

    assert steps[0] == [(alike[0], 20, 40)]
    assert steps[1] == [(alike[0], 40, 41), (longer, 32, 70), (alike[1], 32, 40)]
    assert [sequence.cached for sequence in (longer, *alike)] == [32, 0, 32]
    assert scheduler.stats.cached_tokens == 64
    assert longer.blocks[:2] == alike[0].blocks[:2] == alike[1].blocks[:2]


def test_nobody_waits_for_one_that_was_removed() -> None:
    scheduler = Scheduler(BlockPool(4096), max_running=8)
    first, second = sequence_of("first", 40, 5), sequence_of("second", 40, 5)
    for sequence in (first, second):
        scheduler.add(sequence)
    read(scheduler, 20)
    scheduler.remove(first)

    assert [(piece.sequence, piece.begin, piece.end) for piece in read(scheduler).slices] == [(second, 16, 40)]


def test_another_salt_shares_nothing() -> None:
    scheduler = Scheduler(BlockPool(1024), max_running=8)
    earlier, other = sequence_of("earlier", 40, 5), sequence_of("other", 40, 5)
    other.request = dataclasses.replace(other.request, cache_salt="somebody else")
    scheduler.add(earlier)
    read(scheduler)
    scheduler.add(other)

    assert (other.computed, other.cached) == (0, 0)


def test_the_choices_of_a_job_read_their_prompt_once_and_copy_what_they_write_to() -> None:
    scheduler = Scheduler(BlockPool(1024), max_running=8)
    first = sequence_of("job", 40, 5)
    second, third = (sequence_of("job", 40, 5, leader=first) for _ in range(2))
    for sequence in (first, second, third):
        scheduler.add(sequence)

    assert [(piece.sequence, piece.tokens) for piece in read(scheduler).slices] == [(first, 40)]
    step = read(scheduler)

    assert [(piece.sequence, piece.begin, piece.end) for piece in step.slices] == [
        (first, 40, 41), (second, 39, 40), (third, 39, 40),
    ]  # fmt: skip
    assert len(step.copies) == 2  # of three that write, one keeps the block
    assert len({sequence.blocks[2] for sequence in (first, second, third)}) == 3
    assert len({tuple(sequence.blocks[:2]) for sequence in (first, second, third)}) == 1


def test_when_blocks_run_out_the_last_admitted_gives_way_and_goes_on_later() -> None:
    scheduler = Scheduler(BlockPool(6 * BLOCK_TOKENS), max_running=2)
    first, last = sequence_of("first", 30, 60), sequence_of("last", 31, 60, token=2)
    scheduler.add(first)
    scheduler.add(last)
    while last.running:
        read(scheduler)
    assert (scheduler.stats.preemptions, list(scheduler.waiting), scheduler.room) == (1, [last], 0)
    while not first.ended:
        read(scheduler)
    scheduler.remove(first)

    assert scheduler.running == [last]
    while not last.ended:
        read(scheduler)


def test_those_that_wait_are_admitted_by_priority_and_then_in_the_order_of_arrival() -> None:
    scheduler = Scheduler(BlockPool(1024), max_running=1)
    runs = sequence_of("runs", 5, 5, priority=100)
    ranks = {"low": 9, "normal": 0, "second": 0, "urgent": -9, "low again": 9}
    waiting = {name: sequence_of(name, 5, 5, priority=priority) for name, priority in ranks.items()}
    for sequence in (runs, *waiting.values()):
        scheduler.add(sequence)
    assert scheduler.running == [runs]  # nobody who runs gives way to somebody who waits

    order = []
    while scheduler.running:
        order.append(scheduler.running[0].job_id)
        scheduler.remove(scheduler.running[0])

    assert order == ["runs", "urgent", "normal", "second", "low", "low again"]


def test_when_blocks_run_out_the_least_urgent_gives_way_and_waits_before_its_like() -> None:
    scheduler = Scheduler(BlockPool(8 * BLOCK_TOKENS), max_running=3)
    low, later, urgent = (
        sequence_of(name, 30, 60, token=token, priority=priority)
        for token, (name, priority) in enumerate({"low": 5, "later": 5, "urgent": -5}.items(), 1)
    )
    for sequence in (low, later, urgent):
        scheduler.add(sequence)
    behind = [sequence_of(name, 30, 60, token=4, priority=priority) for name, priority in (("as low", 5), ("last", 6))]
    for sequence in behind:
        scheduler.add(sequence)
    while later.running:
        read(scheduler)
    assert (scheduler.running, scheduler.waiting) == ([low, urgent], [later, *behind])
    while low.running:
        read(scheduler)

    assert (scheduler.running, scheduler.waiting) == ([urgent], [low, later, *behind])
    while not urgent.ended:
        read(scheduler)


@pytest.mark.parametrize("seed", range(60))
def test_a_block_has_one_writer_and_is_given_away_only_when_nobody_refers_to_it(seed: int) -> None:
    draw = random.Random(seed)
    pool, held = BlockPool(20 * BLOCK_TOKENS + 7), list[int]()
    for number in range(400):
        act = draw.random()
        if act < 0.4 and pool.free_blocks:
            [block] = pool.take(1)
            assert block not in held
            held.append(block)
        elif act < 0.6 and held:
            pool.remember(draw.choice(held), bytes([draw.randrange(30)]))
        elif act < 0.7:
            found = pool.find([bytes([draw.randrange(30)])])
            pool.share(found)
            held += found
        elif held:
            pool.give([held.pop(draw.randrange(len(held)))])
        assert pool.free_blocks == pool.blocks - len(set(held)), number
        assert all(pool.is_shared(block) == (held.count(block) > 1) for block in held)
    pool.give(held)

    assert sorted(pool.take(pool.free_blocks)) == list(range(20))
