"""Log-probabilities of a prompt are those of one plain pass, however it is sliced and wherever a job is taken up."""

from __future__ import annotations

import base64
import dataclasses
import json

import pytest
import torch

from core.engine import Engine, EngineConfig
from core.models.load import LoadedModel, load_model
from core.reader import Reader
from core.request import Emitted, Event, FinishedEvent, Request, Result, SamplingParams, TokenEvent, TokenLogprob, Usage
from jobs.logs import complete
from jobs.rows import pack_result
from tests.tiny_models import TinyModel, make

PROMPT = (5, 9, 33, 2, 7, 40, 41, 8, 8, 1, 60, 3)
PARAMS = SamplingParams(max_tokens=6, prompt_logprobs=3, temperature=1.0, seed=4, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make("llama", tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def loaded(tiny: TinyModel) -> LoadedModel:
    return load_model(tiny.folder, name="tiny", dtype="float32", device="cpu")


def engine_of(loaded: LoadedModel, step_tokens: int = 256) -> Engine:
    return Engine(loaded, EngineConfig(model="tiny", kv_memory="1MiB", threads=1, step_tokens=step_tokens))


def compute(engine: Engine, params: SamplingParams, *emitted: Emitted) -> tuple[Result, list[Event]]:
    engine.add("other", Request(token_ids=(3, 4), params=SamplingParams(max_tokens=9)))
    engine.add("job", Request(token_ids=PROMPT, params=params), emitted)
    events: list[Event] = []
    while not engine.idle:
        events += [event for event in engine.step() if event.job_id == "job"]
    assert isinstance(events[-1], FinishedEvent)
    return events[-1].result, events[:-1]


def check(tiny: TinyModel, scored: tuple[TokenLogprob | None, ...] | None) -> None:
    """Against Transformers' own logits."""
    assert scored is not None
    assert len(scored) == len(PROMPT)
    assert scored[0] is None
    expected = torch.log_softmax(tiny.logits(PROMPT), -1)
    for position, found in enumerate(scored[1:]):
        assert found is not None
        row = expected[position]
        values, ids = torch.topk(row, 3)
        assert found.token_id == PROMPT[position + 1]
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in found.top] == ids.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("step_tokens", [1, 2, 5, 256])
def test_they_are_those_of_one_plain_pass_in_any_slices(tiny: TinyModel, loaded: LoadedModel, step_tokens: int) -> None:
    result, _ = compute(engine_of(loaded, step_tokens), PARAMS)
    plain, _ = compute(engine_of(loaded, step_tokens), dataclasses.replace(PARAMS, prompt_logprobs=None))

    check(tiny, result.prompt_logprobs)
    assert result.choices == plain.choices
    assert plain.prompt_logprobs is None
    assert "prompt_logprobs" not in plain.to_wire()


@pytest.mark.parametrize("step_tokens", [4, 256])
def test_a_job_taken_up_at_any_token_has_them_too_even_where_all_was_said(
    tiny: TinyModel, loaded: LoadedModel, step_tokens: int
) -> None:
    whole, said = compute(engine_of(loaded), PARAMS)
    ids = whole.choices[0].token_ids

    for cut in range(len(ids) + 1):
        result, events = compute(engine_of(loaded, step_tokens), PARAMS, Emitted(token_ids=ids[:cut]))
        check(tiny, result.prompt_logprobs)
        assert result.choices == whole.choices
        assert [event.token_ids for event in events if isinstance(event, TokenEvent)] == [(i,) for i in ids[cut:]]
    assert len(said) == len(ids)


def test_one_choice_of_several_reads_the_prompt_for_them(tiny: TinyModel, loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    result, _ = compute(engine, dataclasses.replace(PARAMS, n=3))

    check(tiny, result.prompt_logprobs)
    assert len(result.choices) == 3


def test_a_job_that_is_cancelled_while_its_prompt_is_read_ends_without(loaded: LoadedModel) -> None:
    engine = engine_of(loaded, step_tokens=4)
    engine.add("job", Request(token_ids=PROMPT, params=PARAMS), (Emitted(token_ids=(1,) * 6),))
    engine.step()
    engine.cancel("job")

    [event] = engine.step()
    assert isinstance(event, FinishedEvent)
    assert event.result.prompt_logprobs is None
    assert event.result.choices[0].finish_reason == "length", "it had ended"
    assert engine.idle


def test_a_prompt_of_one_token_has_nothing_to_say(loaded: LoadedModel) -> None:
    [result] = engine_of(loaded).generate([Request(token_ids=(5,), params=PARAMS)])

    assert result.prompt_logprobs == (None,)


def test_a_prompt_that_is_read_twice_is_scored_once(loaded: LoadedModel) -> None:
    assert loaded.tokenizer is None
    one, two = (TokenLogprob(token_id=token_id, logprob=-1.0) for token_id in (9, 33))
    card = engine_of(loaded).card
    [sequence] = Reader(None, (), card).read("job", Request(token_ids=PROMPT[:3], params=PARAMS), ()).sequences
    sequence.score_prompt(0, [one])
    sequence.score_prompt(0, [one, two, None])

    assert sequence.scored == [one, two]
    assert not sequence.wants_prompt_logits


def test_they_are_stored_packed_and_read_back() -> None:
    logprob = TokenLogprob(token_id=4, logprob=-1.25, top=((7, -0.5), (4, -1.25)))
    result = Result(usage=Usage(prompt_tokens=2), prompt_logprobs=(None, logprob))
    stored = json.loads(base64.b64decode(pack_result(result)))

    assert stored["prompt_logprobs"] == [None, [4, -1.25, [[7, -0.5], [4, -1.25]]]]
    assert complete(stored, []) == result.to_wire()
