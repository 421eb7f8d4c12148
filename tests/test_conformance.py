"""One suite for every engine: what the protocol promises, and what each card declares beyond it.

The instant and the torch engine are held to it in ``make test``, vLLM's in ``make test-vllm``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.bounds import BOUNDS
from core.card import ALL_ABILITIES, OPTIONAL_PARAMS, RESUME, RESUME_SAMPLED, ModelCard
from core.errors import InvalidField, PromptTooLong, RequestError, UnsupportedRequest
from core.protocol import EngineProtocol
from core.request import Choice, Emitted, Event, FinishedEvent, Kind, Request, Result, SamplingParams, TokenEvent

MAX_RUNNING = 6
PROMPT = "w5 w9 w33 w7"
NEEDS_VLLM = pytest.mark.skipif(
    os.environ.get("HEADRACE_CONFORMANCE") != "vllm", reason="vLLM has an environment of its own: make test-vllm"
)

#: Parameters that not every engine has, each with a value that is not its default.
VALUES: dict[str, Any] = {
    "n": 2,
    "logprobs": 0,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {"5": 1},
    "min_tokens": 2,
    "stop_token_ids": [5],
    "bad_words": ["w5"],
    "structured_outputs": {"json_object": True},
    "prompt_logprobs": 1,
}


def make_instant(folder: Path) -> EngineProtocol:
    from core.instant import InstantConfig, InstantEngine

    return InstantEngine(InstantConfig(max_running=MAX_RUNNING))


def make_torch(folder: Path) -> EngineProtocol:
    from core.engine import Engine, EngineConfig
    from tests.tiny_models import make_with_words

    model = str(make_with_words(folder))
    return Engine.load(EngineConfig(model=model, dtype="float32", kv_memory="4MiB", max_running=MAX_RUNNING, threads=1))


def make_vllm(folder: Path) -> EngineProtocol:
    from core.vllm_engine import VllmConfig, VllmEngine
    from tests.tiny_models import make_with_words

    args = {"enforce_eager": True, "enable_prefix_caching": False}
    model = str(make_with_words(folder))
    return VllmEngine.load(
        VllmConfig(model=model, dtype="float32", kv_memory="64MiB", max_running=MAX_RUNNING, args=args)
    )


ENGINES = [
    pytest.param(make_instant, id="instant"),
    pytest.param(make_torch, id="torch"),
    pytest.param(make_vllm, id="vllm", marks=[pytest.mark.vllm, NEEDS_VLLM]),
]


@pytest.fixture(scope="module", params=ENGINES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineProtocol:
    engine: EngineProtocol = request.param(tmp_path_factory.mktemp("model"))
    return engine


@pytest.fixture
def engine(loaded: EngineProtocol) -> Iterator[EngineProtocol]:
    """One that has nothing to do, and is left so."""
    assert loaded.idle
    yield loaded
    assert loaded.idle
    assert loaded.room == MAX_RUNNING
    assert loaded.step() == []


def ask(prompt: str = PROMPT, **params: Any) -> Request:
    return Request(prompt=prompt, params=SamplingParams.from_wire({"ignore_eos": True, "max_tokens": 12, **params}))


def drain(engine: EngineProtocol) -> dict[str, list[Event]]:
    """Step until nothing is left; the events of each job."""
    events: dict[str, list[Event]] = {}
    while not engine.idle:
        for event in engine.step():
            events.setdefault(event.job_id, []).append(event)
    return events


def alone(engine: EngineProtocol, request: Request, *emitted: Emitted, job_id: str = "job") -> list[Event]:
    engine.add(job_id, request, emitted)
    return drain(engine)[job_id]


def result_of(events: list[Event]) -> Result:
    assert isinstance(events[-1], FinishedEvent)
    assert not any(isinstance(event, FinishedEvent) for event in events[:-1])
    return events[-1].result


def choice_of(events: list[Event]) -> Choice:
    [choice] = result_of(events).choices
    return choice


def said(events: list[Event], index: int = 0) -> list[TokenEvent]:
    return [event for event in events if isinstance(event, TokenEvent) and event.index == index]


def text_of(events: list[Event], index: int = 0) -> str:
    return "".join(event.text for event in said(events, index))


def same(one: Choice, other: Choice) -> bool:
    """Equal, up to the last digits of log-probabilities."""
    if (one.text, one.token_ids, one.finish_reason) != (other.text, other.token_ids, other.finish_reason):
        return False
    pairs = list(zip(one.logprobs or (), other.logprobs or (), strict=True))
    return all(a.token_id == b.token_id and abs(a.logprob - b.logprob) < 1e-3 for a, b in pairs)


def emitted_of(choice: Choice, cut: int) -> Emitted:
    return Emitted(token_ids=choice.token_ids[:cut], logprobs=(choice.logprobs or ())[:cut])


DECLARED = {*ALL_ABILITIES, *OPTIONAL_PARAMS}


def needs(engine: EngineProtocol, ability: str) -> None:
    """Skip what the card does not declare, where it has a choice."""
    if ability in DECLARED and ability not in engine.card.abilities:
        pytest.skip(f"the {engine.card.engine} engine does not declare {ability}")


def test_a_greedy_answer_is_the_same_in_any_company(engine: EngineProtocol) -> None:
    requests = {str(n): ask(f"w{n + 4} w9 w{n + 20}", max_tokens=4 + n) for n in range(9)}
    expected = {name: choice_of(alone(engine, request)) for name, request in requests.items()}
    for name, request in requests.items():
        engine.add(name, request)
    together = drain(engine)

    assert {name: choice_of(events) for name, events in together.items()} == expected
    assert [len(choice.token_ids) for choice in expected.values()] == [4 + n for n in range(9)]
    assert {choice.finish_reason for choice in expected.values()} == {"length"}
    assert len({choice.token_ids for choice in expected.values()}) > 5, "they all say the same: that proves nothing"


def test_what_is_said_piece_by_piece_is_the_text_of_the_result(engine: EngineProtocol) -> None:
    events = alone(engine, ask())

    assert text_of(events) == choice_of(events).text
    assert len(choice_of(events).text.split()) == 12
    assert tuple(i for event in said(events) for i in event.token_ids) == choice_of(events).token_ids


@pytest.mark.parametrize("stop_at", [None, 5, 9])
def test_a_greedy_answer_taken_up_at_any_token_is_the_undisturbed_one(
    engine: EngineProtocol, stop_at: int | None
) -> None:
    needs(engine, RESUME)
    words = choice_of(alone(engine, ask())).text.split()
    request = ask(logprobs=1, stop=[] if stop_at is None else [f"{words[stop_at - 1]} {words[stop_at]}"])
    undisturbed = alone(engine, request)
    whole = choice_of(undisturbed)
    assert whole.finish_reason == ("length" if stop_at is None else "stop")

    for cut in range(len(whole.token_ids) + 1):
        engine.add("other", ask("w8 w8", max_tokens=3))
        rest = alone(engine, request, emitted_of(whole, cut))
        assert same(choice_of(rest), whole), cut
        assert [event.token_ids for event in said(rest)] == [event.token_ids for event in said(undisturbed)[cut:]]
        assert text_of([*said(undisturbed)[:cut], *rest]) == whole.text


def test_a_drawn_answer_taken_up_keeps_what_was_published_and_goes_on_the_same_each_time(
    engine: EngineProtocol,
) -> None:
    needs(engine, RESUME)
    request = ask(temperature=1.2, seed=7)
    whole = choice_of(alone(engine, request))

    rest, again = (choice_of(alone(engine, request, emitted_of(whole, 5))) for _ in range(2))

    assert rest == again
    assert rest.token_ids[:5] == whole.token_ids[:5]
    assert len(rest.token_ids) == 12
    assert (rest == whole) or RESUME_SAMPLED not in engine.card.abilities


def test_a_seed_decides_what_is_drawn_and_the_jobs_id_where_there_is_none(engine: EngineProtocol) -> None:
    needs(engine, "seed")

    def drawn(job_id: str, **params: Any) -> tuple[int, ...]:
        return choice_of(alone(engine, ask(temperature=1.5, **params), job_id=job_id)).token_ids

    assert drawn("a", seed=1) == drawn("b", seed=1) != drawn("a", seed=2)
    assert drawn("a") == drawn("a") != drawn("b")


def test_a_stop_string_ends_the_text_before_it_and_none_of_it_was_said(engine: EngineProtocol) -> None:
    words = choice_of(alone(engine, ask())).text.split()
    events = alone(engine, ask(stop=[f"{words[4]} {words[5]}", "never"]))

    assert choice_of(events).text.split() == words[:4]
    assert choice_of(events).finish_reason == "stop"
    assert text_of(events) == choice_of(events).text
    assert len(choice_of(events).token_ids) == 6


def test_a_cancelled_job_ends_in_the_next_step_with_what_it_has(engine: EngineProtocol) -> None:
    engine.add("a", ask(max_tokens=60))
    engine.add("b", ask(max_tokens=8))
    before = [event for _ in range(4) for event in engine.step() if event.job_id == "a"]
    engine.cancel("a", "deadline")
    engine.cancel("unknown")
    now = [event for event in engine.step() if event.job_id == "a"]

    assert choice_of(now).finish_reason == "deadline"
    assert choice_of(now).text == text_of(before)
    assert choice_of(now).token_ids == tuple(i for event in said(before) for i in event.token_ids)
    assert len(said(before)) > 0
    assert set(drain(engine)) == {"b"}


def test_a_dropped_job_says_nothing_more(engine: EngineProtocol) -> None:
    engine.add("a", ask(max_tokens=60))
    engine.add("b", ask(max_tokens=8))
    engine.step()
    engine.drop("a")
    engine.drop("unknown")

    assert set(drain(engine)) == {"b"}


def test_a_job_can_come_back_after_it_was_dropped(engine: EngineProtocol) -> None:
    expected = choice_of(alone(engine, ask()))
    engine.add("a", ask(max_tokens=60))
    engine.step()
    engine.drop("a")

    assert choice_of(alone(engine, ask(), job_id="a")) == expected


def test_log_probabilities_are_given_where_they_are_asked_for(engine: EngineProtocol) -> None:
    needs(engine, "logprobs")
    events = alone(engine, ask(logprobs=3))
    logprobs = choice_of(events).logprobs
    assert logprobs is not None

    assert [each.token_id for each in logprobs] == list(choice_of(events).token_ids)
    assert all(each.logprob <= 0 and len(each.top) == 3 for each in logprobs)
    assert all(each.top[0] == (each.token_id, each.logprob) for each in logprobs), "the greedy token is the likeliest"
    assert [event.logprobs for event in said(events)] == [(each,) for each in logprobs]
    assert choice_of(alone(engine, ask())).logprobs is None
    assert all(each.top == () for each in choice_of(alone(engine, ask(logprobs=0))).logprobs or ())


def test_log_probabilities_of_the_prompt_are_given_wherever_the_job_is_taken_up(engine: EngineProtocol) -> None:
    needs(engine, "prompt_logprobs")
    whole = result_of(alone(engine, ask(prompt_logprobs=2)))
    scored = whole.prompt_logprobs or ()
    again = result_of(alone(engine, ask(prompt_logprobs=2), emitted_of(whole.choices[0], 12))).prompt_logprobs or ()

    assert len(scored) == whole.usage.prompt_tokens
    assert [each and each.token_id for each in scored] == [None, 9, 33, 7]
    assert all(each is None or (each.logprob <= 0 and len(each.top) == 2) for each in scored)
    assert [each and each.token_id for each in again] == [each and each.token_id for each in scored]
    assert result_of(alone(engine, ask())).prompt_logprobs is None


def test_every_choice_is_drawn_by_itself_and_resumed_where_it_stood(engine: EngineProtocol) -> None:
    needs(engine, "n")
    greedy = choice_of(alone(engine, ask()))
    events = alone(engine, ask(n=4, temperature=1.2, seed=3))
    choices = result_of(events).choices
    emitted = [Emitted(token_ids=choice.token_ids[:cut]) for choice, cut in zip(choices, (0, 3, 12, 7), strict=True)]
    rest = result_of(alone(engine, ask(n=4, temperature=1.2, seed=3), *emitted)).choices

    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert len({choice.token_ids for choice in choices}) == 4
    assert result_of(events).usage.completion_tokens == 48
    assert [text_of(events, index) for index in range(4)] == [choice.text for choice in choices]
    assert rest[2] == choices[2]
    assert [choice.token_ids[:3] for choice in rest[1:]] == [choice.token_ids[:3] for choice in choices[1:]]
    assert {choice.token_ids for choice in result_of(alone(engine, ask(n=2))).choices} >= {greedy.token_ids}


def test_more_choices_than_places_all_end(engine: EngineProtocol) -> None:
    needs(engine, "n")
    engine.add("many", ask(n=MAX_RUNNING + 3, temperature=1.0, max_tokens=5))

    assert engine.room == 0
    assert [len(choice.token_ids) for choice in result_of(drain(engine)["many"]).choices] == [5] * (MAX_RUNNING + 3)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_penalty_makes_an_answer_repeat_itself_less_wherever_it_is_taken_up(
    engine: EngineProtocol, name: str
) -> None:
    needs(engine, name)
    plain, request = choice_of(alone(engine, ask(max_tokens=30))), ask(PROMPT, max_tokens=30, **{name: 2.0})
    varied = choice_of(alone(engine, request))

    assert len(set(varied.token_ids)) > len(set(plain.token_ids))
    assert varied.token_ids[0] == plain.token_ids[0] or name == "repetition_penalty"
    for cut in (1, 7, 19, 30):
        assert same(choice_of(alone(engine, request, emitted_of(varied, cut))), varied), cut


def test_a_bias_draws_what_it_favours(engine: EngineProtocol) -> None:
    needs(engine, "logit_bias")
    favoured = choice_of(alone(engine, ask(logit_bias={"7": 100})))

    assert set(favoured.token_ids) == {7}


def test_a_stop_token_ends_the_answer_and_is_no_part_of_its_text(engine: EngineProtocol) -> None:
    needs(engine, "stop_token_ids")
    plain = choice_of(alone(engine, ask(temperature=1.3, seed=2)))
    stop = next(token_id for token_id in plain.token_ids[4:] if token_id > 2)
    place = plain.token_ids.index(stop)
    stopped = choice_of(alone(engine, ask(temperature=1.3, seed=2, stop_token_ids=[stop])))

    assert (stopped.token_ids, stopped.finish_reason) == (plain.token_ids[: place + 1], "stop")
    assert plain.text.startswith(stopped.text)
    assert f"w{stop}" not in stopped.text.split()


def test_min_tokens_keeps_the_end_away(engine: EngineProtocol) -> None:
    needs(engine, "min_tokens")
    words = choice_of(alone(engine, ask())).token_ids
    ends: dict[str, Any] = {"stop_token_ids": list(words), "ignore_eos": False}
    early, late = choice_of(alone(engine, ask(**ends))), choice_of(alone(engine, ask(min_tokens=9, **ends)))

    assert len(early.token_ids) == 1
    assert len(late.token_ids) > 9
    assert not set(late.token_ids[:9]) & set(words)


def test_bad_words_are_never_said(engine: EngineProtocol) -> None:
    needs(engine, "bad_words")
    words = choice_of(alone(engine, ask())).text.split()
    for bad in (words[3], f"{words[3]} {words[4]}"):
        text = choice_of(alone(engine, ask(bad_words=[bad]))).text
        assert f" {bad} " not in f" {text} "
        assert text.split()[:3] == words[:3]


def test_top_k_of_one_takes_the_likeliest_token(engine: EngineProtocol) -> None:
    if engine.card.engine == "instant":
        pytest.skip("the instant engine has no probabilities to filter")
    greedy = choice_of(alone(engine, ask()))

    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert choice_of(alone(engine, ask(temperature=1.5, seed=9, **filters))) == greedy, filters


@pytest.mark.parametrize("edge", ["low", "high"])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_parameter_may_be_as_small_and_as_large_as_its_bound_says(
    engine: EngineProtocol, name: str, edge: str
) -> None:
    needs(engine, name)
    value = getattr(BOUNDS[name], edge) + (1e-6 if BOUNDS[name].above and edge == "low" else 0)
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 2, name: int(value) if BOUNDS[name].whole else value}
    params["max_tokens"] = max(params["max_tokens"], params.get("min_tokens", 0))
    [*choices] = result_of(alone(engine, ask(**params))).choices

    assert len(choices) == params.get("n", 1)
    assert all(len(choice.token_ids) == min(params["max_tokens"], engine.card.max_model_len - 4) for choice in choices)


@pytest.mark.parametrize(
    ("refused", "field"),
    [
        ({"token_ids": (10**6,)}, "input.prompt_token_ids"),
        ({"token_ids": (5,) * 200_000}, "input.prompt_token_ids"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_by_name_and_leaves_no_trace(
    engine: EngineProtocol, refused: dict[str, Any], field: str
) -> None:
    expected = choice_of(alone(engine, ask()))
    engine.add("b", ask())
    room = engine.room
    with pytest.raises((InvalidField, PromptTooLong)) as raised:
        engine.add("a", Request(**refused))

    assert raised.value.param == field
    assert engine.room == room
    assert choice_of(drain(engine)["b"]) == expected


def test_a_kind_that_is_not_declared_is_refused_and_one_that_is_is_computed(engine: EngineProtocol) -> None:
    request = Request(kind=Kind.PREDICT, token_ids=(5, 9, 33))
    if Kind.PREDICT.value in engine.card.kinds:
        assert len(result_of(alone(engine, request)).token_ids or ()) == 3
        return
    with pytest.raises(UnsupportedRequest, match="kind"):
        engine.add("a", request)


def test_room_and_idle_tell_the_truth(engine: EngineProtocol) -> None:
    rooms = [engine.room]
    for n in range(MAX_RUNNING):
        engine.add(str(n), ask(max_tokens=3 + n))
        rooms.append(engine.room)
    idle = engine.idle
    ended = len([event for event in engine.step() + engine.step() + engine.step() if isinstance(event, FinishedEvent)])

    assert rooms == list(range(MAX_RUNNING, -1, -1))
    assert not idle
    assert engine.room == ended
    assert len(drain(engine)) == MAX_RUNNING - ended


def test_the_counters_count_every_token(engine: EngineProtocol) -> None:
    stats = engine.stats
    before = (stats.prompt_tokens, stats.generated_tokens, stats.steps, stats.step_seconds)
    rows = sum(count * steps for count, steps in stats.decode_rows.items())
    results = [alone(engine, ask(max_tokens=5)), alone(engine, ask("w5 w6", max_tokens=7))]

    assert [result_of(events).usage.prompt_tokens for events in results] == [4, 2]
    assert stats.prompt_tokens - before[0] == 6
    assert stats.generated_tokens - before[1] == 12
    assert sum(count * steps for count, steps in stats.decode_rows.items()) - rows == 12
    assert stats.steps - before[2] >= 12
    assert stats.step_seconds > before[3]


def test_a_card_says_who_computes_and_survives_the_wire(engine: EngineProtocol) -> None:
    card = engine.card

    assert ModelCard.from_wire(card.to_wire()) == card
    assert set(card.abilities) <= {*OPTIONAL_PARAMS, RESUME, RESUME_SAMPLED}
    assert card.identity.startswith(f"{card.engine}-")
    if card.engine == "vllm":
        import vllm

        assert vllm.__version__ in card.identity


def test_an_engine_refuses_a_parameter_that_its_card_does_not_declare(engine: EngineProtocol) -> None:
    values: dict[str, Any] = {**VALUES, "seed": 1, "top_p": 0.5, "top_k": 3, "min_p": 0.1}
    assert set(values) == set(OPTIONAL_PARAMS)
    for name, value in values.items():
        if name not in engine.card.abilities:
            with pytest.raises(RequestError, match=name):
                engine.add("a", ask(**{name: value}))


def test_where_not_all_fit_the_lower_priority_goes_first_and_nobody_who_runs_gives_way(engine: EngineProtocol) -> None:
    asked = ask(n=MAX_RUNNING, max_tokens=4)
    engine.add("runs", dataclasses.replace(asked, priority=9))
    events = engine.step()
    for job_id, priority in (("low", 5), ("normal", 0), ("urgent", -5)):
        engine.add(job_id, dataclasses.replace(asked, priority=priority))
    while not engine.idle:
        events += engine.step()

    begun = dict.fromkeys(event.job_id for event in events if isinstance(event, TokenEvent))
    assert [*begun] == ["runs", "urgent", "normal", "low"]
    assert [event.job_id for event in events if isinstance(event, FinishedEvent)] == [*begun]
