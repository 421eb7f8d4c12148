"""A worker whose loop hangs is killed by its parent, and its jobs say why; one that is only slow or idle is not."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rq.job import Job

from tests.conftest import Server, start_valkey
from tests.worker_world import await_end, ended_alike, eventually, put, tokens, worker


def deaths(job: Job) -> list[dict[str, Any]]:
    """What the job's record says, oldest first."""
    found: list[dict[str, Any]] = json.loads(job.connection.hget(f"rq:job:{job.id}", "deaths") or "[]")
    return found


def test_a_step_that_never_returns_costs_its_neighbours_the_stall_time_and_is_a_dead_letter(
    valkey_url: str, tmp_path: Path
) -> None:
    with worker(valkey_url, tmp_path, stall_seconds=1, lease_seconds=30, grace_seconds=30) as process:
        before = [put(process.client, f"before {n}", max_tokens=100) for n in range(5)]
        eventually(lambda: all(tokens(job) > 3 for job in before), "tokens", process.log)
        pid = process.engine_pid()
        poison = put(process.client, "!hang")
        killed = eventually(lambda: deaths(poison), "a death on the job's record", process.log)
        assert await_end(poison, process.log) == "failed"
        ended_alike(before, process.log)
        error = json.loads(process.client.hget(f"rq:job:{poison.id}", "error"))
        assert process.engine_pid() != pid
        log = process.log.read_text()

    assert killed[0]["how"] == "no sign of life for 1 s"
    assert killed[0]["neighbours"] == 5
    assert [death["neighbours"] for death in deaths(poison)][2] == 0
    assert [death["attempt"] for death in deaths(poison)] == [1, 2, 3]
    assert error["message"].endswith("; no sign of life for 1 s at 0 tokens, alone")
    assert log.count("died: no sign of life for 1 s") == 3
    assert all(deaths(job) == [] for job in before), "a job that succeeds needs no explanation"


def test_a_stopped_engine_process_is_killed_and_its_jobs_go_on(valkey_url: str, tmp_path: Path) -> None:
    with worker(
        valkey_url, tmp_path, stall_seconds=1, lease_seconds=30, grace_seconds=30, instant_step_ms=20
    ) as process:
        jobs = [put(process.client, f"job {n}", max_tokens=200) for n in range(4)]
        eventually(lambda: all(tokens(job) > 3 for job in jobs), "tokens", process.log)
        pid = process.engine_pid()
        os.kill(pid, signal.SIGSTOP)
        record = eventually(lambda: deaths(jobs[0]), "a death on the job's record", process.log)
        ended_alike(jobs, process.log)

    assert not Path(f"/proc/{pid}").exists()
    assert record[0]["tokens"] > 3
    assert record[0]["worker"].startswith(process.name)
    assert abs(record[0]["at"] - time.time()) < 60


def test_a_parent_that_was_stopped_itself_does_not_kill_a_healthy_process(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path, stall_seconds=1, instant_step_ms=20) as process:
        job = put(process.client, "long", max_tokens=300)
        eventually(lambda: tokens(job) > 3, "tokens", process.log)
        pid = process.engine_pid()
        process.parent.send_signal(signal.SIGSTOP)
        time.sleep(3)  # three times the silence that is allowed
        process.parent.send_signal(signal.SIGCONT)
        time.sleep(1)

        assert process.engine_pid() == pid
        ended_alike([job], process.log)


def test_an_idle_worker_gives_signs_also_while_it_is_suspended_or_redis_is_away(
    own_valkey: Server, tmp_path: Path
) -> None:
    with worker(own_valkey.url, tmp_path, stall_seconds=1) as process:
        pid = process.engine_pid()
        time.sleep(2.5)  # idleness itself is measured
        process.client.set("rq:suspended", 1)
        time.sleep(2.5)
        own_valkey.process.kill()
        own_valkey.process.wait()
        time.sleep(2.5)
        again = start_valkey(own_valkey.folder)
        try:
            assert process.engine_pid() == pid
            assert "killing" not in process.log.read_text()
        finally:
            process.parent.kill()
            again.process.kill()
            again.process.wait()


@pytest.mark.slow
def test_a_redis_that_hangs_is_not_taken_for_a_step_that_hangs(own_valkey: Server, tmp_path: Path) -> None:
    with worker(own_valkey.url, tmp_path, stall_seconds=8, lease_seconds=30) as process:
        pid = process.engine_pid()
        own_valkey.process.send_signal(signal.SIGSTOP)
        time.sleep(13)
        own_valkey.process.send_signal(signal.SIGCONT)
        job = put(process.client, "after", max_tokens=5)

        ended_alike([job], process.log)
        assert process.engine_pid() == pid


def test_a_step_that_hangs_while_draining_is_killed_before_the_draining_is_over(
    valkey_url: str, tmp_path: Path
) -> None:
    with worker(valkey_url, tmp_path, stall_seconds=1, drain_seconds=60, instant_step_ms=20) as process:
        job = put(process.client, "long", max_tokens=5000)
        eventually(lambda: tokens(job) > 3, "tokens", process.log)
        pid = process.engine_pid()
        process.parent.terminate()
        eventually(lambda: process.client.hget(process.client.keys("headrace:worker:*")[0], "state") == b"draining")
        os.kill(pid, signal.SIGSTOP)
        code = process.parent.wait(10)

    assert code == 1
    assert job.get_status(refresh=True) == "queued"
    assert deaths(job)[0]["how"] == "no sign of life for 1 s"


def test_a_step_that_raises_is_logged_once_and_named_on_the_job(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path) as process:
        poison = put(process.client, "!raise")
        assert await_end(poison, process.log) == "failed"
        log = process.log.read_text()

    assert [death["how"] for death in deaths(poison)] == ["exit code 1: RuntimeError"] * 3
    assert log.count("Traceback") == log.count("RuntimeError: the prompt asked for a fault") == 3
