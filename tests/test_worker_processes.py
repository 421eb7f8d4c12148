"""``python -m worker`` as processes, with real signals and a real Valkey: who is killed, what goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Server, start_valkey
from tests.worker_world import answer, await_end, ended_alike, environment, eventually, put, tokens, whole, worker


def test_a_killed_engine_process_costs_its_jobs_two_seconds_and_no_token(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path, lease_seconds=30, grace_seconds=30, instant_step_ms=20) as process:
        jobs = [put(process.client, f"job {n}", max_tokens=150) for n in range(5)]
        eventually(lambda: all(tokens(job) > 10 for job in jobs), "tokens", process.log)
        before = {job.id: tokens(job) for job in jobs}
        killed = time.monotonic()
        process.kill_engine()
        eventually(lambda: all(tokens(job) > before[job.id] + 5 for job in jobs), "new tokens", process.log)
        seconds = time.monotonic() - killed
        ended_alike(jobs, process.log)

    assert seconds < 4, seconds  # 2 on a machine that does nothing else
    for n, job in enumerate(jobs):
        assert whole(job) == answer(f"job {n}", max_tokens=150)


def test_two_workers_share_a_queue_and_one_dies_half_way(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path) as first, worker(valkey_url, tmp_path) as second:
        params: list[dict[str, Any]] = [{"max_tokens": 1 + n % 60, "temperature": n % 2, "seed": n} for n in range(200)]
        jobs = [put(first.client, f"job {n}", **params[n]) for n in range(200)]
        eventually(lambda: first.client.zcard("rq:finished:generate") > 60, "half of the jobs", first.log)
        first.kill_engine()
        ended_alike(jobs, second.log)
        attempts = [int(first.client.hget(f"rq:job:{job.id}", "attempt")) for job in jobs]
        for n, job in enumerate(jobs):
            assert whole(job) == answer(f"job {n}", **params[n])

    assert max(attempts) > 1, "the kill hit no running job: the test proved nothing"
    assert first.client.zcard("rq:failed:generate") == 0


@pytest.mark.parametrize(("prompt", "death"), [("!crash", "signal SIGKILL"), ("!raise", "exit code 1")])
def test_a_poison_job_is_a_dead_letter_after_three_deaths_and_harms_nobody(
    valkey_url: str, tmp_path: Path, prompt: str, death: str
) -> None:
    with worker(valkey_url, tmp_path, instant_step_ms=2) as process:
        before = [put(process.client, f"before {n}", max_tokens=40) for n in range(10)]
        poison = put(process.client, prompt)
        after = [put(process.client, f"after {n}", max_tokens=40) for n in range(10)]
        assert await_end(poison, process.log) == "failed"
        ended_alike(before + after, process.log)
        deaths = process.log.read_text().count(f"died: {death}")
        error = json.loads(process.client.hget(f"rq:job:{poison.id}", "error"))

    assert deaths == 3
    assert error["code"] == "poison_job"


def test_sigterm_finishes_what_fits_and_hands_back_the_rest_in_order_with_its_tokens(
    valkey_url: str, tmp_path: Path
) -> None:
    with worker(valkey_url, tmp_path, drain_seconds=1, instant_step_ms=20, max_running=4) as process:
        short = put(process.client, "short", max_tokens=20)
        long = [put(process.client, f"long {n}", max_tokens=400) for n in range(3)]
        queued = [put(process.client, f"queued {n}", max_tokens=5) for n in range(3)]
        eventually(lambda: tokens(long[2]) > 5, "tokens", process.log)
        told = time.monotonic()
        code = process.stop()
        seconds = time.monotonic() - told
        order = process.client.lrange("rq:queue:generate", 0, -1)
        kept = {job.id: tokens(job) for job in long}
        crashes = [process.client.hget(f"rq:job:{job.id}", "crashes") for job in long]
        workers = process.client.smembers("rq:workers")

    assert code == 0
    assert 0.9 < seconds < 2, seconds
    assert short.get_status(refresh=True) == "finished"
    assert [job_id.decode() for job_id in order] == [job.id for job in long + queued]
    assert min(kept.values()) > 5
    assert {int(count or 0) for count in crashes} == {0}
    assert workers == set()
    with worker(valkey_url, tmp_path) as process:
        ended_alike([*long, *queued], process.log)
    assert [whole(job) for job in long] == [answer(f"long {n}", max_tokens=400) for n in range(3)]


def test_a_second_sigterm_hands_back_at_once(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path, drain_seconds=60, instant_step_ms=20) as process:
        job = put(process.client, "long", max_tokens=4000)
        eventually(lambda: tokens(job) > 5, "tokens", process.log)
        process.parent.terminate()
        time.sleep(0.5)
        start = time.monotonic()
        code = process.stop()

    assert code == 0
    assert time.monotonic() - start < 1
    assert job.get_status(refresh=True) == "queued"


def test_a_worker_without_jobs_leaves_at_once(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path, drain_seconds=60, tick_seconds=2, lease_seconds=10) as process:
        ended_alike([put(process.client, "warm", max_tokens=5)], process.log)
        time.sleep(0.55)  # now it is blocked on Redis, and has been for less than half a second
        start = time.monotonic()
        code = process.stop()
        seconds = time.monotonic() - start

    assert code == 0
    assert seconds < 0.4, seconds
    assert process.client.smembers("rq:workers") == set()


def test_redis_may_die_and_come_back_while_jobs_run(own_valkey: Server, tmp_path: Path) -> None:
    with worker(own_valkey.url, tmp_path, lease_seconds=5, instant_step_ms=10) as process:
        jobs = [put(process.client, f"job {n}", max_tokens=100) for n in range(40)]
        eventually(lambda: tokens(jobs[0]) > 5, "tokens", process.log)
        pid = process.engine_pid()
        own_valkey.process.kill()
        own_valkey.process.wait()
        time.sleep(1.0)  # the outage itself: long enough for running jobs to end meanwhile
        again = start_valkey(own_valkey.folder)
        try:
            ended_alike(jobs, process.log)
            assert process.engine_pid() == pid
            assert {process.client.hget(f"rq:job:{job.id}", "attempt") for job in jobs} == {b"1"}
        finally:
            process.parent.kill()
            again.process.kill()
            again.process.wait()


def test_the_instant_engines_worker_imports_no_torch(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path) as process:
        maps = (
            Path(f"/proc/{process.engine_pid()}/maps").read_text()
            + Path(f"/proc/{process.parent.pid}/maps").read_text()
        )

    assert "torch" not in maps
    assert "numpy" not in maps


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"engine": "jax"}, "HEADRACE_ENGINE"), ({"lease_seconds": "soon"}, "HEADRACE_LEASE_SECONDS")],
)
def test_a_configuration_that_can_never_run_is_said_plainly_and_not_retried(
    valkey_url: str, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    command = [sys.executable, "-P", "-m", "worker"]
    run = subprocess.run(command, env=environment(valkey_url, **settings), capture_output=True, text=True, timeout=30)

    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_a_worker_that_slept_past_its_lease_cannot_write_over_its_successor(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path) as sleeper:
        jobs = [put(sleeper.client, f"job {n}", max_tokens=200) for n in range(6)]
        eventually(lambda: all(tokens(job) > 5 for job in jobs), "tokens", sleeper.log)
        os.kill(sleeper.engine_pid(), signal.SIGSTOP)
        with worker(valkey_url, tmp_path) as other:
            eventually(lambda: other.held() == len(jobs), "claim", other.log)
            os.kill(sleeper.engine_pid(), signal.SIGCONT)
            ended_alike(jobs, other.log)
            eventually(lambda: sleeper.held() + other.held() == 0, "rest", sleeper.log)
            late = put(other.client, "late", max_tokens=5)
            assert await_end(late) == "finished"
            assert sleeper.parent.poll() is None
            assert sleeper.log.read_text().count("died") == 0

    for n, job in enumerate(jobs):
        assert whole(job) == answer(f"job {n}", max_tokens=200)
