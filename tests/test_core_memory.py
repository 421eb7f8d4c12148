"""When memory runs out in a step, the step shrinks; a job ends only if not even one token of it fits."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from core.batch import Batch
from core.budget import CALM_STEPS, StepBudget
from core.engine import Engine, EngineConfig
from core.errors import OutOfMemory
from core.memory import free_unused, is_out_of_memory
from core.models.load import LoadedModel, load_model
from core.request import Event, FailedEvent, FinishedEvent, Kind, Request, Result, SamplingParams, TokenEvent
from core.scheduler import Slice, Step
from tests.test_core_scheduler import sequence_of
from tests.tiny_models import make

ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:91] data. DefaultCPUAllocator: not enough memory"),
    MemoryError,
]


class Cramped:
    """A runner that computes, cache writes and all, and then finds no memory where ``fits`` says so."""

    def __init__(self, engine: Engine, fits: Callable[[Batch], bool], error: Callable[[], Exception] = MemoryError):
        self._runner = engine._runner
        self._fits = fits
        self._error = error
        self._held: weakref.ref[Tensor] | None = None
        self.passes: list[int] = []  #: tokens of those that went through
        self.failures: list[int] = []

    def forward(self, batch: Batch) -> Tensor:
        assert self._held is None or self._held() is None, "what the failed pass had allocated is still held"
        tokens = len(batch.slots)
        logits = self._runner.forward(batch)
        if not self._fits(batch):
            self.failures.append(tokens)
            self._held = weakref.ref(logits)
            raise self._error()
        self.passes.append(tokens)
        return logits


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make("llama", tmp_path_factory.mktemp("llama")).folder
    return load_model(folder, name="tiny", dtype="float32", device="cpu")


def engine_of(loaded: LoadedModel, **config: Any) -> Engine:
    return Engine(loaded, EngineConfig(**{"model": "tiny", "kv_memory": "1MiB", "threads": 1, **config}))


def cramp(engine: Engine, fits: Callable[[Batch], bool], error: Callable[[], Exception] = MemoryError) -> Cramped:
    runner = Cramped(engine, fits, error)
    engine._runner = runner  # type: ignore[assignment]
    return runner


def at_most(tokens: int) -> Callable[[Batch], bool]:
    return lambda batch: len(batch.slots) <= tokens


def without_the_hog(engine: Engine) -> Callable[[Batch], bool]:
    """No pass with a token of the job ``hog`` fits."""

    def fits(batch: Batch) -> bool:
        job = engine._jobs.get("hog")
        blocks = {block for sequence in job.sequences for block in sequence.blocks} if job else set()
        return blocks.isdisjoint(batch.tables.tolist())

    return fits


def some_jobs(seed: int) -> dict[str, Request]:
    chance = random.Random(seed)
    jobs = {}
    for number in range(7):
        prompt = tuple(chance.randrange(64) for _ in range(chance.randint(1, 25)))
        params = SamplingParams(max_tokens=chance.randint(1, 14), n=chance.randint(1, 3), temperature=0.9, logprobs=1)
        jobs[str(number)] = Request(token_ids=prompt, params=params)
    return {**jobs, "predict": Request(kind=Kind.PREDICT, token_ids=tuple(range(30)))}


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    return events


def run(engine: Engine, jobs: dict[str, Request]) -> list[Event]:
    for job_id, request in jobs.items():
        engine.add(job_id, request)
    return drain(engine)


def results(events: list[Event]) -> dict[str, Result]:
    """By job, without log-probabilities, whose last digits depend on the size of a pass."""
    return {event.job_id: plain(event.result) for event in events if isinstance(event, FinishedEvent)}


def plain(result: Result) -> Result:
    choices = tuple(dataclasses.replace(choice, logprobs=None) for choice in result.choices)
    return dataclasses.replace(result, choices=choices)


def published(events: list[Event]) -> Counter[tuple[str, int, tuple[int, ...]]]:
    return Counter((e.job_id, e.index, e.token_ids) for e in events if isinstance(e, TokenEvent))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("limit", [1, 2, 5, 13])
def test_all_jobs_go_on_unchanged_in_smaller_passes(
    loaded: LoadedModel, limit: int, error: Callable[[], Exception]
) -> None:
    jobs = some_jobs(limit)
    undisturbed = run(engine_of(loaded), jobs)
    engine = engine_of(loaded, step_tokens=64)
    runner = cramp(engine, at_most(limit), error)
    events = run(engine, jobs)

    assert results(events) == results(undisturbed)
    assert published(events) == published(undisturbed)
    assert runner.failures
    assert max(runner.passes) <= limit


def test_the_wall_is_not_hit_in_each_step_and_is_forgotten_in_time(loaded: LoadedModel) -> None:
    jobs = {str(n): Request(token_ids=(n,), params=SamplingParams(max_tokens=120, ignore_eos=True)) for n in range(8)}
    limit = 3
    engine = engine_of(loaded)
    runner = cramp(engine, lambda batch: len(batch.slots) <= limit)
    for job_id, request in jobs.items():
        engine.add(job_id, request)
    for _ in range(4 * CALM_STEPS):
        engine.step()
    failures, before = len(runner.failures), len(runner.passes)
    limit = 100
    for _ in range(2 * CALM_STEPS + 1):
        engine.step()

    assert failures <= 3 + 4  # eight tokens and both their halves; then four tokens after each calm spell
    assert max(runner.passes[:before]) == 2
    assert max(runner.passes[before:]) > 4
    assert len(runner.failures) == failures


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("choices", [1, 3])
def test_a_job_that_fits_in_no_pass_fails_alone_by_name(loaded: LoadedModel, place: int, choices: int) -> None:
    params = SamplingParams(max_tokens=30, n=2, temperature=0.9, ignore_eos=True)
    neighbours = {f"job-{n}": Request(token_ids=(5, 6, n), params=params) for n in range(3)}
    hog = Request(token_ids=(1, 63, 2), params=SamplingParams(n=choices))
    jobs = list(neighbours.items())
    jobs.insert(place, ("hog", hog))
    engine = engine_of(loaded, max_running=16)
    cramp(engine, without_the_hog(engine))
    events = run(engine, dict(jobs))

    [failed] = [event for event in events if event.job_id == "hog"]
    assert isinstance(failed, FailedEvent)
    assert isinstance(failed.error, OutOfMemory)
    assert failed.error.code == "out_of_memory"
    for setting in ("max_running", "step_tokens", "kv_memory", "max_tokens"):
        assert setting in str(failed.error)
    assert results(events) == results(run(engine_of(loaded), neighbours))
    assert engine.room == 16


def test_one_job_too_large_does_not_slow_its_neighbours_down(loaded: LoadedModel) -> None:
    """Its neighbours' passes fit: the next steps are as large as those."""
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    jobs = {str(n): Request(token_ids=(n,), params=params) for n in range(8)}
    jobs["hog"] = Request(token_ids=(63,))
    engine = engine_of(loaded)
    runner = cramp(engine, without_the_hog(engine))
    run(engine, jobs)

    assert engine.stats.steps <= 2 * 20
    assert len(runner.failures) <= 5


def test_without_any_memory_every_job_fails_and_the_engine_can_go_on(loaded: LoadedModel) -> None:
    engine, jobs, plenty = engine_of(loaded), some_jobs(1), False
    runner = cramp(engine, lambda _: plenty)
    events = run(engine, jobs)
    assert Counter(event.job_id for event in events) == Counter(list(jobs))
    assert {type(event) for event in events} == {FailedEvent}
    plenty = True

    assert results(run(engine, jobs)) == results(run(engine_of(loaded), jobs))
    assert max(runner.passes) > 100  # nothing had fitted, so size was not the reason: steps are as large as ever


def test_a_job_that_does_not_fit_alone_leaves_the_next_its_full_step(loaded: LoadedModel) -> None:
    engine = engine_of(loaded, step_tokens=1)
    cramp(engine, without_the_hog(engine))

    [event] = run(engine, {"hog": Request(token_ids=(63,))})

    assert isinstance(event, FailedEvent)
    assert results(run(engine, some_jobs(3))) == results(run(engine_of(loaded), some_jobs(3)))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("no memory")])
def test_any_other_error_of_a_step_is_not_swallowed(loaded: LoadedModel, error: Exception) -> None:
    engine = engine_of(loaded)
    cramp(engine, lambda _: False, lambda: error)
    engine.add("a", Request(token_ids=(1, 2)))

    with pytest.raises(type(error), match="memory"):
        engine.step()


def test_torchs_own_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.float32)

    assert is_out_of_memory(raised.value)


def test_what_torch_keeps_on_a_card_is_given_back_before_the_next_try(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr("core.engine.free_unused", calls.append)
    engine = engine_of(loaded)
    runner = cramp(engine, at_most(4))
    run(engine, {"a": Request(token_ids=tuple(range(16)))})

    def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
        calls.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr("torch.cuda.device", on)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: calls.append("emptied"))
    free_unused(torch.device("cpu"))
    free_unused(torch.device("cuda:1"))

    failures = [loaded.device] * len(runner.failures)
    assert calls == [*failures, torch.device("cuda:1"), "emptied"]
    assert failures


def test_a_budget_falls_to_what_fitted_and_grows_back() -> None:
    budget, seen = StepBudget(100), []
    budget.fitted(80)
    budget.end_step()  # what fitted in an earlier step says nothing about this one
    budget.exceeded()
    for tokens in (12, 25, 13):
        budget.fitted(tokens)
    budget.end_step()
    for _ in range(3 * CALM_STEPS):
        seen.append(budget.tokens)
        budget.fitted(1)
        budget.end_step()

    assert seen == [25] * CALM_STEPS + [50] * CALM_STEPS + [100] * CALM_STEPS
    assert budget.tokens == 100


@pytest.mark.parametrize("seed", range(30))
def test_halves_are_the_same_tokens_in_the_same_order(seed: int) -> None:
    chance = random.Random(seed)
    slices = []
    for number in range(chance.randint(1, 5)):
        sequence = sequence_of(str(number), 30, 5)
        sequence.running = True
        begin = chance.randint(0, 20)
        slices.append(Slice(sequence, begin, begin + chance.randint(1, 10)))
    step = Step(tuple(slices))
    if step.tokens == 1:
        return
    first, second = step.halves()

    def tokens(part: Step) -> list[tuple[str, int]]:
        return [(piece.sequence.job_id, at) for piece in part.slices for at in range(piece.begin, piece.end)]

    assert tokens(first) + tokens(second) == tokens(step)
    assert 0 <= second.tokens - first.tokens <= 1
    slices[0].sequence.running = False
    assert slices[0].sequence.job_id not in dict(tokens(step.still_running()))
