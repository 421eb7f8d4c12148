"""``python -m core.bench``: its loop over the instant engine, with a clock that only sleeping and steps move."""

from __future__ import annotations

from typing import Any

import pytest

from core.bench import Drive
from core.instant import InstantConfig, InstantEngine

STEP_SECONDS = 0.01


class World:
    """An instant engine on a clock of its own, and what the run said."""

    def __init__(self, max_running: int = 32) -> None:
        self.now = 0.0
        self.said: list[dict[str, Any]] = []
        config = InstantConfig(step_seconds=STEP_SECONDS, max_running=max_running)
        self.engine = InstantEngine(config, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def drive(self, **plan: Any) -> list[dict[str, Any]]:
        nothing = {"bodies": [body(3)], "requests": 1, "concurrency": None, "due": None, "seconds": None}
        Drive(self.engine, {**nothing, **plan}, self.said.append, clock=lambda: self.now, sleep=self.sleep).run()
        return self.said


def body(tokens: int, **params: Any) -> dict[str, Any]:
    asked = {"max_tokens": tokens, "ignore_eos": True, **params}
    return {"kind": "generate", "input": {"prompt_token_ids": [1, 2]}, "params": asked}


def test_a_closed_loop_asks_again_as_answers_end() -> None:
    said = World().drive(requests=6, concurrency=2)

    assert len(said) == 6
    assert [one["error"] for one in said] == [None] * 6
    assert [sum(count for _, count in one["deliveries"]) for one in said] == [3] * 6
    assert sorted({round(one["due"], 6) for one in said}) == pytest.approx([0.0, said[0]["ended"], said[2]["ended"]])


def test_an_open_loop_counts_from_when_a_request_was_due_though_the_engine_had_no_room() -> None:
    said = World(max_running=1).drive(requests=3, due=[0.0, 0.0, 0.001])

    assert [one["due"] for one in said] == [0.0, 0.0, 0.001]
    assert [round(one["ended"] / STEP_SECONDS) for one in said] == sorted(
        {round(one["ended"] / STEP_SECONDS) for one in said}
    )
    assert said[2]["deliveries"][0][0] > said[1]["ended"]


def test_an_idle_engine_is_not_asked_to_step_until_something_is_due() -> None:
    world = World()
    said = world.drive(requests=1, due=[5.0])

    assert said[0]["due"] == 5.0
    assert said[0]["deliveries"][0][0] >= 5.0


def test_nothing_is_sent_after_the_duration() -> None:
    said = World().drive(requests=1_000, concurrency=1, seconds=0.1)

    assert 1 < len(said) < 1_000
    assert max(one["due"] for one in said) < 0.1


def test_a_refused_request_is_told_and_the_run_goes_on() -> None:
    said = World().drive(requests=4, concurrency=1, bodies=[body(3), body(-1)])

    assert [one["error"] is None for one in said] == [True, False, True, False]
