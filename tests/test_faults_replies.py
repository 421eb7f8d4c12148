"""Replies that a worker never hears: what was done is done once, and nothing is left behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis

from jobs import keys
from tests.faults_world import BUSY_SECONDS, TIMES, ask, running, undisturbed
from tests.jobs_world import audit
from tests.proxy import cut, proxied
from tests.worker_world import eventually, worker

#: Nobody is taken for dead here: whatever is found again is found by those who lost it.
PATIENT = {"lease_seconds": 3, "grace_seconds": 60, "tick_seconds": 0.2, "max_running": 8}
BEAT_SECONDS = 1.0


@pytest.mark.parametrize("names", [("claim", "BLPOP"), ("publish", "renew"), ("settle", "reap")])
def test_a_reply_that_is_lost_costs_no_job_and_no_token_and_nothing_stays_behind(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path, names: tuple[str, str]
) -> None:
    """Two replies of each kind. The first kind of a pair may bring a claim along, each costs its jobs one attempt."""
    with proxied(valkey_url) as proxy, worker(proxy.url, tmp_path, **PATIENT) as process:
        pid = process.engine_pid()
        rules = {f"{name} {skip}": proxy.after(name, cut, skip=skip) for name in names for skip in (0, 2)}
        asked = ask(valkey, 40, least=20, most=80)
        start = time.monotonic()
        undisturbed(asked, valkey, process.log)
        seconds = time.monotonic() - start
        eventually(lambda: all(rule.happened.is_set() for rule in rules.values()), f"loss of each of {names}")

        assert process.engine_pid() == pid
        assert max(each.attempt for each in asked) <= 3
        assert seconds < 4 * BEAT_SECONDS + BUSY_SECONDS


def test_a_worker_that_does_not_hear_that_its_jobs_are_back_loses_none(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    with proxied(valkey_url) as proxy, worker(proxy.url, tmp_path, **PATIENT, drain_seconds=0) as process:
        asked = ask(valkey, 10, least=60, most=100)
        eventually(lambda: running(asked[:8]), "tokens", process.log)
        rule = proxy.after("release", cut, skip=3)
        process.stop()
        assert rule.happened.is_set()
        assert valkey.llen(keys.READY) == 10
        assert audit(valkey) == []
    with worker(valkey_url, tmp_path, **TIMES) as process:
        undisturbed(asked, valkey, process.log)


def test_a_successor_that_does_not_hear_what_was_said_before_asks_again(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    with worker(valkey_url, tmp_path, **PATIENT, drain_seconds=0) as process:
        asked = ask(valkey, 10, least=60, most=100)
        eventually(lambda: running(asked[:8]), "tokens", process.log)
        assert process.stop() == 0
    with proxied(valkey_url) as proxy:
        rules = [proxy.after("log", cut, skip=skip) for skip in (0, 3)]
        with worker(proxy.url, tmp_path, **PATIENT) as process:
            start = time.monotonic()
            undisturbed(asked, valkey, process.log)

    assert all(rule.happened.is_set() for rule in rules)
    assert time.monotonic() - start < 3 * BEAT_SECONDS + BUSY_SECONDS
