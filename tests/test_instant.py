"""What the instant engine promises; the same promises as any engine's, and its hooks."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from typing import Any

import pytest

from core.errors import EngineError, InvalidField, PromptTooLong
from core.instant import MAX_MODEL_LEN, InstantConfig, InstantEngine
from core.protocol import EngineProtocol
from core.request import (
    Emitted,
    Event,
    FailedEvent,
    FinishedEvent,
    Kind,
    Message,
    Request,
    Result,
    SamplingParams,
    TokenEvent,
)


def run(engine: EngineProtocol) -> dict[str, list[Event]]:
    """Step until nothing is left; the events of each job."""
    events: dict[str, list[Event]] = {}
    while not engine.idle:
        for event in engine.step():
            events.setdefault(event.job_id, []).append(event)
    return events


def ask(prompt: str = "Once upon a time", **params: Any) -> Request:
    return Request(prompt=prompt, params=SamplingParams.from_wire(params))


def result_of(events: list[Event]) -> Result:
    assert isinstance(events[-1], FinishedEvent)
    return events[-1].result


def alone(request: Request, *emitted: Emitted, job_id: str = "a") -> list[Event]:
    engine = InstantEngine()
    engine.add(job_id, request, emitted)
    return run(engine)[job_id]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenEvent))


def test_the_same_prompt_gives_the_same_tokens_in_any_company() -> None:
    engine = InstantEngine()
    for n in range(8):
        engine.add(str(n), ask(f"prompt {n % 4}", max_tokens=5 + n))

    together = run(engine)

    for n in range(8):
        assert result_of(together[str(n)]) == result_of(alone(ask(f"prompt {n % 4}", max_tokens=5 + n)))
    assert engine.stats.decode_rows[8] == 5
    assert engine.stats.generated_tokens == sum(5 + n for n in range(8))


def test_a_seed_counts_only_with_a_temperature() -> None:
    def tokens(job_id: str = "a", **params: Any) -> tuple[int, ...]:
        return result_of(alone(ask(**params), job_id=job_id)).choices[0].token_ids

    assert tokens(seed=1) == tokens(seed=2) == tokens("b")
    assert tokens(seed=1, temperature=1.0) != tokens(seed=2, temperature=1.0)
    assert tokens("a", temperature=1.0) != tokens("b", temperature=1.0)


@pytest.mark.parametrize("published", range(12))
@pytest.mark.parametrize("stop_at", [None, 3, 11])
def test_a_successor_goes_on_where_the_tokens_end(published: int, stop_at: int | None) -> None:
    whole = alone(ask(max_tokens=12))
    words = text_of(whole).split()
    stop = [] if stop_at is None else [f"{words[stop_at - 1][-1]} {words[stop_at]}"]
    request = ask(max_tokens=12, stop=stop, logprobs=2)
    events = alone(request)
    tokens = [event for event in events if isinstance(event, TokenEvent)][:published]
    read = [logprob for event in tokens for logprob in event.logprobs or ()]
    emitted = Emitted(token_ids=tuple(i for event in tokens for i in event.token_ids), logprobs=tuple(read))

    rest = alone(request, emitted)

    assert result_of(rest) == result_of(events)
    assert text_of([*tokens, *rest]) == result_of(events).choices[0].text
    assert len(rest) == len(events) - len(tokens)


def choices_of(events: list[Event]) -> list[tuple[int, ...]]:
    return [choice.token_ids for choice in result_of(events).choices]


def test_choices_differ_and_the_first_is_what_it_is_alone() -> None:
    [first] = choices_of(alone(ask(max_tokens=9)))
    events = alone(ask(max_tokens=9, n=4))

    assert choices_of(events)[0] == first
    assert len({*choices_of(events)}) == 4
    assert first[:4] == (417, 453, 494, 83)  # as they were when a job had one choice: stored answers go on
    assert [choice.index for choice in result_of(events).choices] == [0, 1, 2, 3]
    assert (result_of(events).usage.prompt_tokens, result_of(events).usage.completion_tokens) == (4, 36)


@pytest.mark.parametrize("seed", range(30))
def test_a_successor_goes_on_with_every_choice_where_it_stopped(seed: int) -> None:
    chance = random.Random(seed)
    words = result_of(alone(ask(max_tokens=12, n=3))).choices[1].text.split()
    request = ask(max_tokens=12, n=3, stop=[f"{words[6][-1]} {words[7]}"], logprobs=1, temperature=0)
    events = alone(request)
    assert [choice.finish_reason for choice in result_of(events).choices] == ["length", "stop", "length"]
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    cuts = [chance.randint(0, 12) for _ in range(3)]
    parts = [[event for event in tokens if event.index == index][:cut] for index, cut in enumerate(cuts)]
    emitted = [
        Emitted(
            token_ids=tuple(i for event in part for i in event.token_ids),
            logprobs=tuple(each for event in part for each in event.logprobs or ()),
        )
        for part in parts
    ]

    rest = alone(request, *emitted)

    assert result_of(rest) == result_of(events)
    assert len(rest) == len(events) - sum(map(len, parts))
    for index, part in enumerate(parts):
        after = [event for event in rest if isinstance(event, TokenEvent) and event.index == index]
        assert text_of([*part, *after]) == result_of(events).choices[index].text


def test_choices_beyond_the_places_are_drawn_one_after_the_other() -> None:
    engine = InstantEngine(InstantConfig(max_running=2))
    engine.add("a", ask(max_tokens=5, n=5))
    engine.add("b", ask(max_tokens=5))
    room = engine.room
    together = run(engine)

    assert room == 0
    assert result_of(together["a"]) == result_of(alone(ask(max_tokens=5, n=5)))
    assert result_of(together["b"])
    assert engine.stats.decode_rows == {2: 15}


def test_a_cancelled_job_ends_the_choices_that_go_on() -> None:
    words = result_of(alone(ask(max_tokens=9, n=2))).choices[1].text.split()
    engine = InstantEngine()
    engine.add("a", ask(max_tokens=9, n=2, stop=[words[1]]))
    events = [event for _ in range(3) for event in engine.step()]
    engine.cancel("a")
    [last] = engine.step()

    assert [choice.finish_reason for choice in result_of([last]).choices] == ["cancelled", "stop"]
    assert "".join(choice.text for choice in result_of([last]).choices[:1]) == text_of(
        [event for event in events if isinstance(event, TokenEvent) and event.index == 0]
    )
    assert engine.idle


def test_text_ends_before_the_first_stop_string_and_none_of_it_was_sent() -> None:
    words = text_of(alone(ask(max_tokens=20))).split()
    stop = " ".join(words[4:6])
    events = alone(ask(max_tokens=20, stop=[stop, "never"]))

    choice = result_of(events).choices[0]

    assert choice.text == " ".join(words[:4]) + " "
    assert choice.finish_reason == "stop"
    assert text_of(events) == choice.text
    assert len(choice.token_ids) == 6


def test_a_cancelled_job_ends_with_what_it_has_sent() -> None:
    engine = InstantEngine()
    engine.add("a", ask(max_tokens=50, stop=["w"]))
    engine.add("b", ask(max_tokens=50))
    first = engine.step()
    engine.cancel("b", "deadline")
    engine.cancel("unknown")

    last = engine.step()

    finished = next(event for event in last if isinstance(event, FinishedEvent) and event.job_id == "b")
    assert finished.result.choices[0].finish_reason == "deadline"
    assert finished.result.choices[0].text == text_of([event for event in first if event.job_id == "b"])
    assert engine.idle


def test_a_dropped_job_is_forgotten_without_an_event() -> None:
    engine = InstantEngine(InstantConfig(max_running=2))
    engine.add("a", ask())
    room = engine.room

    engine.drop("a")

    assert (room, engine.room) == (1, 2)
    assert engine.step() == []


def test_predict_answers_at_each_position_in_one_step() -> None:
    [event] = alone(Request(kind=Kind.PREDICT, token_ids=(12, 7, 93)))

    assert isinstance(event, FinishedEvent)
    assert event.result.token_ids == (85, 50, 652)


def test_what_cannot_be_computed_is_refused_by_name() -> None:
    engine = InstantEngine()

    with pytest.raises(InvalidField, match=r"input\.token_ids.*below 1000"):
        engine.add("a", Request(kind=Kind.PREDICT, token_ids=(1000,)))
    with pytest.raises(InvalidField, match=r"input\.prompt_token_ids"):
        engine.add("a", Request(token_ids=(1, 2000)))
    with pytest.raises(PromptTooLong):
        engine.add("a", ask("x " * MAX_MODEL_LEN))
    engine.add("b", Request(messages=(Message(role="user", content="hello"),)))

    assert engine.room == 31


def test_a_prompt_may_ask_for_a_failure() -> None:
    events = alone(ask("!fail"))

    assert [type(event) for event in events] == [FailedEvent]
    assert isinstance(events[0], FailedEvent)
    assert isinstance(events[0].error, EngineError)


def test_a_prompt_may_make_the_step_raise() -> None:
    engine = InstantEngine()
    engine.add("a", ask("!raise"))

    with pytest.raises(RuntimeError, match="asked for a fault"):
        engine.step()


@pytest.mark.parametrize(("prompt", "tokens"), [("!crash", 0), ("!crash 3", 3)])
def test_a_prompt_may_kill_the_process(prompt: str, tokens: int) -> None:
    program = f"""
from core.instant import InstantEngine
from core.request import Request
engine = InstantEngine()
engine.add("a", Request(prompt={prompt!r}))
while True:
    print(len(engine.step()), flush=True)
"""
    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)

    assert died.returncode == -signal.SIGKILL
    assert len(died.stdout.split()) == tokens
