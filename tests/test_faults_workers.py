"""Workers that die: at random, at each crash point, while they drain, with their host. Nothing is lost or repeated."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from jobs import keys
from tests.faults_world import (
    BUSY_SECONDS,
    TIMES,
    WORST_SECONDS,
    ask,
    crew,
    kill_holders,
    lose_host,
    running,
    seconds_until_resumed,
    undisturbed,
)
from tests.jobs_world import audit
from tests.proxy import Moment, kill, proxied
from tests.worker_world import eventually, worker

KILLS = 7


def test_random_kills_of_busy_workers_lose_nothing_and_repeat_nothing(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    with crew(valkey_url, tmp_path, 3, max_running=4) as workers:
        asked = ask(valkey, 80, least=40, most=120)
        moments = kill_holders(valkey, seed=1, times=KILLS, pause_seconds=0.25)
        undisturbed(asked, valkey, workers[0].log)
        attempts = [each.attempt for each in asked]

    assert len(moments) == KILLS, "the jobs ended before the kills did: the test proves less than it says"
    assert 1 < max(attempts) <= KILLS + 1
    assert sum(attempts) > len(asked) + KILLS  # each kill hit somebody


def kill_mid_step(moment: Moment) -> bytes:
    """The process dies a little later, while its engine computes."""
    threading.Timer(0.003, kill, (moment,)).start()
    return moment.passing


CRASH_POINTS = {
    "before a claim": ("before", "claim", kill, 0),
    "after a claim, its reply unheard": ("after", "claim", kill, 0),
    "before it publishes": ("before", "publish", kill, 4),
    "after it has published, the reply unheard": ("after", "publish", kill, 4),
    "in the middle of a step": ("after", "publish", kill_mid_step, 4),
    "before it settles": ("before", "settle", kill, 2),
    "after it has settled, the reply unheard": ("after", "settle", kill, 2),
    "after it has renewed its lease": ("after", "renew", kill, 0),
}


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_worker_killed_at_this_point_loses_nothing_and_repeats_nothing(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path, point: str
) -> None:
    when, name, act, skip = CRASH_POINTS[point]
    with proxied(valkey_url) as proxy, worker(proxy.url, tmp_path, **TIMES, max_running=8) as process:
        died = process.engine_pid()
        rule = getattr(proxy, when)(name, act, skip=skip, matches=lambda moment: moment.pid == died)
        asked = ask(valkey, 12, least=30, most=80)
        undisturbed(asked, valkey, process.log)

        assert rule.happened.is_set()
        assert "died: signal SIGKILL" in process.log.read_text()
        assert max(each.attempt for each in asked) <= 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_killed_while_it_hands_its_jobs_back_loses_none(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path, when: str
) -> None:
    with proxied(valkey_url) as proxy, worker(proxy.url, tmp_path, **TIMES, drain_seconds=0, max_running=4) as process:
        asked = ask(valkey, 6, least=60, most=100)
        eventually(lambda: running(asked[:4]), "tokens", process.log)
        rule = getattr(proxy, when)("release", kill, skip=1)
        assert process.stop() == 1  # it had to be given up
        assert rule.happened.is_set()
        order: list[Any] = valkey.lrange(keys.READY, 0, -1)
        assert sorted(order[:4]) == [each.job.id.encode() for each in asked[:4]]
        assert order[4:] == [each.job.id.encode() for each in asked[4:]]
        assert audit(valkey) == []
    with worker(valkey_url, tmp_path, **TIMES) as process:
        undisturbed(asked, valkey, process.log)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_parent_that_dies_while_it_buries_its_engine_leaves_the_rest_to_the_lease(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path, when: str
) -> None:
    with proxied(valkey_url) as proxy, worker(proxy.url, tmp_path, **TIMES) as process:
        asked = ask(valkey, 8, least=60, most=100)
        eventually(lambda: running(asked), "tokens", process.log)
        engine = process.engine_pid()
        rule = getattr(proxy, when)("reap", kill, matches=lambda moment: moment.pid == process.parent.pid)
        os.kill(engine, signal.SIGKILL)
        assert process.parent.wait(10) == -signal.SIGKILL
        assert rule.happened.is_set()
    with worker(valkey_url, tmp_path, **TIMES) as process:
        undisturbed(asked, valkey, process.log)


# -- how long it takes


def test_the_jobs_of_a_killed_process_go_on_within_two_seconds_elsewhere(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    patient = {"instant_step_ms": 10, "lease_seconds": 30, "grace_seconds": 30}  # nobody finds out but the parent
    with worker(valkey_url, tmp_path, **patient) as first:
        asked = ask(valkey, 8, least=100, most=120)
        eventually(lambda: running(asked), "tokens", first.log)
        with worker(valkey_url, tmp_path, **patient) as second:  # it is up, and has room
            first.kill_engine()
            seconds = seconds_until_resumed(asked, time.monotonic(), second.log)
            undisturbed(asked, valkey, second.log)

    print(f"after a SIGKILL, the first resumed tokens of 8 jobs: {seconds:.2f} s (bar: 2 s)")
    assert seconds < 2 + BUSY_SECONDS


def test_the_jobs_of_a_lost_host_go_on_after_lease_grace_and_two_ticks(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    with worker(valkey_url, tmp_path, **TIMES, instant_step_ms=10) as first:
        asked = ask(valkey, 6, least=100, most=120)
        eventually(lambda: running(asked), "tokens", first.log)
        with worker(valkey_url, tmp_path, **TIMES, instant_step_ms=10) as second:  # it is up, and has room
            lose_host(first)
            seconds = seconds_until_resumed(asked, time.monotonic(), second.log)
            undisturbed(asked, valkey, second.log)

    print(f"after a lost host, the first resumed tokens of 6 jobs: {seconds:.2f} s (worst: {WORST_SECONDS} s)")
    assert seconds < WORST_SECONDS + BUSY_SECONDS


@pytest.mark.parametrize("signals", [1, 2])
def test_workers_that_are_replaced_one_by_one_under_load_lose_nothing_and_count_no_crash(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path, signals: int
) -> None:
    drain = 0.3 if signals == 1 else 30
    with ExitStack() as stack:
        workers = [stack.enter_context(worker(valkey_url, tmp_path, **TIMES, drain_seconds=drain)) for _ in range(2)]
        asked = ask(valkey, 200, least=60, most=140)  # more than is done before the last is replaced
        for old in workers[:2]:
            eventually(old.held, "jobs", old.log)
            workers.append(stack.enter_context(worker(valkey_url, tmp_path, **TIMES)))
            start = time.monotonic()
            if signals == 2:
                old.parent.terminate()
                time.sleep(0.4)  # closer together they are one: the same signal, sent to a whole group
            assert old.stop() == 0
            assert time.monotonic() - start < min(drain, 0.4) + 1 + BUSY_SECONDS
        undisturbed(asked, valkey, workers[-1].log)

    assert max(each.attempt for each in asked) > 1
    assert {int(valkey.hget(f"{keys.JOB}{each.job.id}", "crashes") or 0) for each in asked} == {0}
