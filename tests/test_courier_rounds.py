"""The courier as a program: how it starts, when it tries again, how it stops."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from core.errors import StoreUnavailable
from courier.post import Answer
from courier.rounds import JITTER, PROBLEM, Courier
from courier.settings import LONGEST_PAUSE_SECONDS, CourierSettings
from jobs.outbox import Callback
from jobs.store import Store
from tests.courier_world import SECRET, courier, receiving
from tests.jobs_world import add, settings
from tests.worker_world import environment, eventually

TIMEOUT_SECONDS = 1.0


class Desk:
    """An outbox that hands out one callback, again and again, and writes down what is said of it."""

    def __init__(self, tries: int) -> None:
        self.noted: list[tuple[str, float | None]] = []
        self.away = 0  #: times that Redis is not there
        self._callback = Callback(
            id="evt_1", attempt=tries, tries=tries, job_id="j", url="https://a.example", type="job.failed", ended_at=1
        )

    async def collect(self, lease_seconds: float, bound: int) -> list[Callback]:
        assert lease_seconds > TIMEOUT_SECONDS
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")
        return [] if self.noted else [self._callback]

    async def delivered(self, callback: Callback) -> None:
        self.noted.append(("delivered", None))

    async def failed(self, callback: Callback, problem: str, again_in_seconds: float | None) -> None:
        self.noted.append((problem, again_in_seconds))


class Voice:
    """A poster that always hears the same."""

    def __init__(self, answer: Answer) -> None:
        self.sent = 0
        self._answer = answer

    async def send(self, callback: Callback) -> Answer:
        self.sent += 1
        return self._answer


def after(tries: int, answer: Answer, pauses: tuple[float, ...]) -> tuple[str, float | None]:
    """What is noted after the attempt of that number."""
    desk: Any = Desk(tries)
    voice: Any = Voice(answer)

    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, stop.set)
        await Courier(desk, voice, TIMEOUT_SECONDS, pauses).run(stop)

    asyncio.run(run())
    assert voice.sent == (tries <= len(pauses) + 1)
    found: tuple[str, float | None] = desk.noted[0]
    return found


@pytest.mark.parametrize("tries", range(1, 10))
def test_each_pause_is_that_of_the_schedule_give_or_take_a_fifth(tries: int) -> None:
    pauses = CourierSettings(webhook_hosts="a.example").pauses
    problem, pause = after(tries, Answer(why="500"), pauses)

    assert len(pauses) == 9
    assert problem == PROBLEM
    assert pause is not None
    assert 1 - JITTER <= pause / pauses[tries - 1] <= 1 + JITTER


def test_pauses_are_not_all_alike() -> None:
    assert len({after(1, Answer(), (1.0,))[1] for _ in range(5)}) > 1


@pytest.mark.parametrize(
    ("tries", "answer", "noted"),
    [
        (3, Answer(why="500"), (PROBLEM, None)),
        (1, Answer(gone=True), (PROBLEM, None)),
        (4, Answer(delivered=True), (PROBLEM, None)),  # the courier of the last attempt died: nothing is sent
        (3, Answer(delivered=True), ("delivered", None)),
        (1, Answer(retry_after_seconds=100), (PROBLEM, 100)),
        (1, Answer(retry_after_seconds=1e12), (PROBLEM, LONGEST_PAUSE_SECONDS)),
    ],
)
def test_what_comes_of_an_answer(tries: int, answer: Answer, noted: tuple[str, float | None]) -> None:
    assert after(tries, answer, (1, 1)) == noted


def test_a_redis_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("courier.rounds.AWAY_SECONDS", 0.001)
    desk: Any = Desk(1)
    voice: Any = Voice(Answer(delivered=True))
    desk.away = 3

    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, stop.set)
        await Courier(desk, voice, TIMEOUT_SECONDS, (1,)).run(stop)

    asyncio.run(run())
    assert desk.noted == [("delivered", None)]


def test_a_courier_that_is_told_to_stop_finishes_what_is_under_way_and_exits_0(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    store = Store(settings(valkey_url, durability="memory"))
    with (
        receiving(lambda _: None) as receiver,
        courier(valkey_url, tmp_path, receiver.host, webhook_timeout_seconds=10) as process,
    ):
        add(store, "j", webhook=receiver.url())
        store.cancel("j")
        eventually(lambda: receiver.got, "a delivery under way", tmp_path / "courier.log")
        process.send_signal(signal.SIGTERM)
        add(store, "k", webhook=receiver.url())
        store.cancel("k")
        receiver.go_on.set()
        code = process.wait(10)
        hooks = [store.get(job_id).webhook for job_id in ("j", "k")]
    store.close()

    assert code == 0
    assert [hook and hook.state for hook in hooks] == ["delivered", "pending"]
    assert SECRET not in (tmp_path / "courier.log").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"webhook_hosts": ""}, "webhook_hosts: must list who may be called back"),
        ({"webhook_hosts": "/"}, "HEADRACE_WEBHOOK_HOSTS: must list host"),
        ({"webhook_secret": ""}, "webhook_secret: is empty"),
        ({"webhook_secret": "hunter2"}, "webhook_secret: must be whsec_"),
        ({"redis_url": ""}, "HEADRACE_REDIS_URL"),
    ],
)
def test_a_courier_that_can_never_work_says_why_and_exits_2(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    environ = environment("redis://127.0.0.1:1", **{"webhook_hosts": "a.example", "webhook_secret": SECRET, **changes})
    command = [sys.executable, "-P", "-m", "courier"]
    ended = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=30)

    assert ended.returncode == 2
    assert said in ended.stderr
    assert "hunter2" not in ended.stderr
    assert "Traceback" not in ended.stderr
