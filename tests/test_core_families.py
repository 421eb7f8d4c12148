"""Greedy tokens are Transformers' own, for every family, alone and in any mix."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from core.engine import Engine, EngineConfig
from core.errors import RequestError
from core.request import Event, FinishedEvent, Kind, Request, Result, SamplingParams
from tests.tiny_models import FAMILIES, VOCAB, TinyModel, make


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make(request.param, tmp_path_factory.mktemp(request.param))


def engine_of(folder: Path, *, step_tokens: int = 256, max_running: int = 8, kv_memory: str = "4MiB") -> Engine:
    return Engine.load(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            step_tokens=step_tokens,
            max_running=max_running,
            kv_memory=kv_memory,
            threads=1,
        )
    )


def ask(prompt: list[int], tokens: int) -> Request:
    return Request(token_ids=tuple(prompt), params=SamplingParams(max_tokens=tokens, ignore_eos=True))


def prompts(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def run_with_arrivals(engine: Engine, requests: list[Request], seed: int) -> dict[str, Result]:
    """Sequences join between steps, whenever a coin says so."""
    draw, waiting = random.Random(seed), list(enumerate(requests))
    results: dict[str, Result] = {}
    while waiting or not engine.idle:
        while waiting and engine.room and draw.random() < 0.5:
            number, request = waiting.pop(0)
            engine.add(str(number), request)
        events: list[Event] = engine.step()
        results |= {event.job_id: event.result for event in events if isinstance(event, FinishedEvent)}
    return results


def test_alone_each_prompt_gets_the_tokens_of_transformers_generate(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder)
    for prompt in prompts(1, 3):
        [result] = engine.generate([ask(prompt, 24)])

        assert list(result.choices[0].token_ids) == tiny.greedy(prompt, 24)


@pytest.mark.parametrize("step_tokens", [1, 5, 17, 256])
def test_in_any_mix_each_prompt_gets_the_tokens_of_transformers_generate(tiny: TinyModel, step_tokens: int) -> None:
    draw = random.Random(step_tokens)
    asked = [(prompt, draw.randint(1, 20)) for prompt in prompts(step_tokens, 7)]
    engine = engine_of(tiny.folder, step_tokens=step_tokens, max_running=4)

    results = run_with_arrivals(engine, [ask(*each) for each in asked], seed=step_tokens)

    for number, (prompt, tokens) in enumerate(asked):
        assert list(results[str(number)].choices[0].token_ids) == tiny.greedy(prompt, tokens)


def test_predict_answers_with_the_likeliest_id_at_each_position(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder, step_tokens=6)
    tokens = prompts(3, 1, 40)[0]
    request = Request(kind=Kind.PREDICT, token_ids=tuple(tokens))

    [result, other] = engine.generate([request, ask([4, 5], 3)])

    assert result.token_ids == tuple(tiny.logits(tokens).argmax(-1).tolist())
    assert list(other.choices[0].token_ids) == tiny.greedy([4, 5], 3)


def test_logprobs_are_the_log_softmax_of_the_raw_logits(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder, step_tokens=7)
    [prompt] = prompts(4, 1)
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.7, top_k=5, seed=1, logprobs=3)

    [result] = engine.generate([Request(token_ids=tuple(prompt), params=params)])

    choice = result.choices[0]
    expected = tiny.logits([*prompt, *choice.token_ids]).log_softmax(-1)[len(prompt) - 1 :]
    for row, (token_id, given) in enumerate(zip(choice.token_ids, choice.logprobs or (), strict=True)):
        top = expected[row].topk(3)
        assert given.token_id == token_id
        assert given.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-4)
        assert [pair[0] for pair in given.top] == top.indices.tolist()
        assert [pair[1] for pair in given.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_the_end_of_sequence_ends_the_answer_and_is_its_last_token(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder)
    params = SamplingParams(max_tokens=100, temperature=2.0, seed=5)
    results = engine.generate([Request(token_ids=(7, number), params=params) for number in range(6)])

    for choice in (result.choices[0] for result in results):
        assert choice.finish_reason in ("stop", "length")
        assert (2 in choice.token_ids) == (choice.finish_reason == "stop")
        assert 2 not in choice.token_ids[:-1]


def test_a_refused_request_leaves_the_engine_as_it_was(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder)
    engine.add("good", ask([5, 6, 7], 8))
    bad = [
        (Request(token_ids=(1, VOCAB)), "input.prompt_token_ids"),
        (Request(kind=Kind.PREDICT, token_ids=(VOCAB,)), "input.token_ids"),
        (Request(token_ids=(3,) * 128), "input.prompt_token_ids"),
        (Request(kind=Kind.PREDICT, token_ids=(3,) * 129), "input.token_ids"),
        (Request(prompt="text"), "input.prompt"),
    ]
    room = engine.room
    for request, param in bad:
        with pytest.raises(RequestError) as caught:
            engine.add("bad", request)
        assert caught.value.param == param
    assert engine.room == room

    events = [event for _ in range(12) for event in engine.step()]

    [finished] = [event for event in events if isinstance(event, FinishedEvent)]
    assert list(finished.result.choices[0].token_ids) == tiny.greedy([5, 6, 7], 8)


def test_an_answer_ends_where_the_model_is_full(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder)

    [result] = engine.generate([ask([9] * 120, 64)])

    assert result.choices[0].finish_reason == "length"
    assert len(result.choices[0].token_ids) == 8


def test_generate_leaves_no_job_behind_when_one_is_refused(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder)

    with pytest.raises(RequestError):
        engine.generate([ask([1, 2], 3), Request(token_ids=(VOCAB,))])

    assert engine.idle
    assert torch.get_num_threads() == 1
