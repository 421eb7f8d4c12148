"""Several choices a job: each is what it would be alone, taken up anywhere, and the job ends with the last."""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.engine import Engine, EngineConfig
from core.errors import InvalidField
from core.models.load import LoadedModel, load_model
from core.request import Choice, Emitted, Event, FinishedEvent, Kind, Request, Result, SamplingParams, TokenEvent
from core.sampler import Draw, draw
from tests.tiny_models import TinyModel, make

LETTERS = string.ascii_letters + string.digits + "+-"  # a token is a letter, so that stop strings cross tokens
PROMPT = (5, 9, 33, 2, 7)
PARAMS = SamplingParams(max_tokens=16, n=3, temperature=1.3, top_p=0.95, seed=11, logprobs=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    tiny = make("llama", tmp_path_factory.mktemp("llama"))
    raw = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=LETTERS[2]).save_pretrained(tiny.folder)
    return tiny


@pytest.fixture(scope="module")
def loaded(tiny: TinyModel) -> LoadedModel:
    return load_model(tiny.folder, name="tiny", dtype="float32", device="cpu")


def engine_of(loaded: LoadedModel, **config: Any) -> Engine:
    return Engine(loaded, EngineConfig(**{"model": "tiny", "kv_memory": "1MiB", "threads": 1, **config}))


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    return events


def result_of(events: Iterable[Event], job_id: str = "job") -> Result:
    [result] = [event.result for event in events if isinstance(event, FinishedEvent) and event.job_id == job_id]
    return result


def compute(loaded: LoadedModel, params: SamplingParams, *emitted: Emitted, **config: Any) -> list[Event]:
    """What the job alone says."""
    engine = engine_of(loaded, **config)
    engine.add("job", Request(token_ids=PROMPT, params=params), emitted)
    return drain(engine)


def pieces(events: Iterable[Event], index: int) -> list[tuple[str, tuple[int, ...]]]:
    tokens = [event for event in events if isinstance(event, TokenEvent) and event.job_id == "job"]
    return [(event.text, event.token_ids) for event in tokens if event.index == index]


def said_so_far(choice: Choice, tokens: int) -> Emitted:
    """What an attempt had published that was cut after so many tokens of it."""
    return Emitted(token_ids=choice.token_ids[:tokens], logprobs=(choice.logprobs or ())[:tokens])


def same(one: Result, other: Result) -> bool:
    """Equal, up to the last digits of log-probabilities."""

    def plain(result: Result) -> Result:
        return dataclasses.replace(
            result, choices=tuple(dataclasses.replace(choice, logprobs=None) for choice in result.choices)
        )

    def read(result: Result) -> list[tuple[int, float]]:
        return [(each.token_id, each.logprob) for choice in result.choices for each in choice.logprobs or ()]

    pairs = list(zip(read(one), read(other), strict=True))
    return plain(one) == plain(other) and all(a[0] == b[0] and abs(a[1] - b[1]) < 1e-4 for a, b in pairs)


def drawn_alone(tiny: TinyModel, params: SamplingParams, choice: int) -> list[int]:
    """Token by token with Transformers' own logits, each by the noise of seed, choice and position."""
    tokens = list(PROMPT)
    for position in range(params.max_tokens):
        how = Draw(params, params.seed or 0, position, choice)
        tokens.append(draw(tiny.logits(tokens)[-1:], [how])[0].token_id)
    return tokens[len(PROMPT) :]


def test_each_choice_is_what_its_seed_and_index_draw_alone(tiny: TinyModel, loaded: LoadedModel) -> None:
    params = dataclasses.replace(PARAMS, n=4, ignore_eos=True)
    result = result_of(compute(loaded, params))

    assert [list(choice.token_ids) for choice in result.choices] == [drawn_alone(tiny, params, i) for i in range(4)]
    assert len({choice.token_ids for choice in result.choices}) == 4
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(PROMPT), 4 * 16)


def test_the_first_choices_do_not_depend_on_how_many_there_are(loaded: LoadedModel) -> None:
    few, many = (result_of(compute(loaded, dataclasses.replace(PARAMS, n=n))) for n in (1, 5))

    assert few.choices[0].token_ids == many.choices[0].token_ids


def test_greedy_choices_are_one_answer(loaded: LoadedModel) -> None:
    result = result_of(compute(loaded, SamplingParams(max_tokens=12, n=3)))

    assert len({choice.token_ids for choice in result.choices}) == 1


def with_a_stop(loaded: LoadedModel, choice: int, at: int) -> SamplingParams:
    """Parameters under which this choice ends early, by a stop string across two tokens."""
    params = dataclasses.replace(PARAMS, ignore_eos=True)
    text = result_of(compute(loaded, params)).choices[choice].text
    return dataclasses.replace(params, stop=(text[at : at + 2], "never"))


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.tuples(*[st.integers(0, 17)] * 3),
    step_tokens=st.integers(1, 20),
    max_running=st.integers(1, 5),
    stopped=st.integers(0, 2),
)
def test_choices_taken_up_at_any_tokens_go_on_as_if_undisturbed(
    loaded: LoadedModel, cuts: tuple[int, ...], step_tokens: int, max_running: int, stopped: int
) -> None:
    params = with_a_stop(loaded, stopped, 5)
    undisturbed = compute(loaded, params)
    whole = result_of(undisturbed)
    assert whole.choices[stopped].finish_reason == "stop"
    emitted = [said_so_far(choice, cut) for choice, cut in zip(whole.choices, cuts, strict=True)]
    while emitted and not emitted[-1].token_ids:
        emitted.pop()  # what was published is as long as the last choice that said something

    events = compute(loaded, params, *emitted, step_tokens=step_tokens, max_running=max_running)

    assert same(result_of(events), whole)
    assert isinstance(events[-1], FinishedEvent)
    for index, cut in enumerate(cuts):
        assert pieces(events, index) == pieces(undisturbed, index)[cut:]
        assert "".join(text for text, _ in pieces(undisturbed, index)) == whole.choices[index].text


def test_a_choice_that_had_ended_frees_its_place_and_draws_nothing(loaded: LoadedModel) -> None:
    params = with_a_stop(loaded, 1, 3)
    whole = result_of(compute(loaded, params))
    engine = engine_of(loaded, max_running=8)
    emitted = tuple(said_so_far(choice, 99 if choice.index == 1 else 2) for choice in whole.choices)
    engine.add("job", Request(token_ids=PROMPT, params=params), emitted)

    assert engine.room == 6
    assert pieces(drain(engine), 1) == []


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_cancelled_job_ends_all_choices_that_go_on_with_what_they_have(loaded: LoadedModel, reason: Any) -> None:
    params = with_a_stop(loaded, 2, 2)
    engine = engine_of(loaded)
    engine.add("job", Request(token_ids=PROMPT, params=params))
    engine.add("other", Request(token_ids=PROMPT, params=PARAMS))
    events = [event for _ in range(7) for event in engine.step()]
    engine.cancel("job", reason)

    [last, *others] = engine.step()

    assert isinstance(last, FinishedEvent)
    assert [choice.finish_reason for choice in last.result.choices] == [reason, reason, "stop"]
    for choice in last.result.choices:
        assert choice.text == "".join(text for text, _ in pieces(events, choice.index))
    assert {event.job_id for event in others} == {"other"}
    assert [choice.index for choice in result_of(drain(engine), "other").choices] == [0, 1, 2]


def test_a_dropped_job_frees_what_all_its_choices_had_and_its_id(loaded: LoadedModel) -> None:
    engine = engine_of(loaded, max_running=2)
    engine.add("job", Request(token_ids=PROMPT, params=PARAMS))
    engine.step()
    assert engine.room == 0

    engine.drop("job")

    assert (engine.idle, engine.room, engine.step()) == (True, 2, [])
    engine.add("job", Request(token_ids=PROMPT, params=PARAMS))
    engine.add("job", Request(token_ids=PROMPT, params=PARAMS))
    assert len(result_of(drain(engine)).choices) == 3


@pytest.mark.parametrize("config", [{"max_running": 1}, {"max_running": 3}, {"kv_memory": "60kB"}])
def test_a_job_whose_choices_never_fit_at_once_finishes_alike(loaded: LoadedModel, config: dict[str, Any]) -> None:
    params = dataclasses.replace(PARAMS, n=20, max_tokens=40, ignore_eos=True)
    roomy = result_of(compute(loaded, params, max_running=32))
    engine = engine_of(loaded, **config)
    engine.add("job", Request(token_ids=PROMPT, params=params))
    engine.add("late", Request(token_ids=PROMPT, params=PARAMS))
    assert engine.room == 0
    events = drain(engine)

    assert same(result_of(events), roomy)
    assert max(engine.stats.decode_rows) <= config.get("max_running", 19)
    assert engine.stats.preemptions == 0 or "kv_memory" in config
    assert result_of(events, "late")


@pytest.mark.parametrize("seed", range(10))
def test_any_mix_of_jobs_with_choices_says_what_each_says_alone(loaded: LoadedModel, seed: int) -> None:
    chance = random.Random(seed)
    jobs = {
        str(number): dataclasses.replace(PARAMS, n=chance.randint(1, 5), seed=number, max_tokens=chance.randint(1, 12))
        for number in range(6)
    }
    places = chance.randint(1, 8)
    engine = engine_of(loaded, step_tokens=chance.randint(3, 30), max_running=places)
    events: list[Event] = []
    for job_id, params in jobs.items():
        engine.add(job_id, Request(token_ids=PROMPT, params=params))
        events += engine.step()
    events += drain(engine)

    for job_id, params in jobs.items():
        assert same(result_of(events, job_id), result_of(compute(loaded, params)))
    assert engine.room == places


def test_a_prediction_has_no_choices(loaded: LoadedModel) -> None:
    [result] = engine_of(loaded).generate([Request(kind=Kind.PREDICT, token_ids=PROMPT, params=SamplingParams(n=3))])

    assert (len(result.token_ids or ()), result.choices) == (len(PROMPT), ())


@pytest.mark.parametrize("wrong", [0, 65, 1.0, True, "2", None])
def test_a_number_of_choices_out_of_its_bound_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(InvalidField, match=r"params\.n: must be (from 1 to 64|an integer)"):
        SamplingParams.from_wire({"n": wrong})


def test_the_number_of_choices_goes_over_the_wire_unless_it_is_one() -> None:
    assert SamplingParams.from_wire(SamplingParams(n=64).to_wire()).n == 64
    assert SamplingParams(n=1).to_wire() == {}
