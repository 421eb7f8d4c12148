"""The API's side: it dies in mid-request, its replies are lost, the disk is silent. A repeat makes no second job."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from jobs import keys
from tests.api_world import front
from tests.faults_world import TIMES
from tests.jobs_world import audit
from tests.processes import free_port, get, until
from tests.proxy import Held, cut, kill, proxied
from tests.test_faults_views import HOUR, WRONG_CLOCK
from tests.worker_world import answer, environment, worker

BODY: dict[str, Any] = {"kind": "generate", "input": {"prompt": "x"}, "params": {"max_tokens": 20}}


@contextlib.contextmanager
def api_process(url: str, port: int, **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m api`` that answers, killed at the end."""
    environ = {**environment(url, port=port), **extra}
    process = subprocess.Popen([sys.executable, "-P", "-m", "api"], env=environ, stderr=subprocess.DEVNULL)
    try:
        until(lambda: get(f"http://127.0.0.1:{port}/health"), process)
        yield process
    finally:
        process.kill()
        process.wait(10)


def put(port: int, job_id: str) -> httpx2.Response | None:
    """The answer to a submission; None where the connection breaks."""
    try:
        return httpx2.put(f"http://127.0.0.1:{port}/v1/jobs/{job_id}", json=BODY, timeout=20)
    except httpx2.TransportError:
        return None


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_api_killed_in_mid_request_and_asked_again_makes_one_job(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path, when: str
) -> None:
    port = free_port()
    with proxied(valkey_url) as proxy, worker(valkey_url, tmp_path, **TIMES):
        with api_process(proxy.url, port) as first:
            first_answer = put(port, "acknowledged")
            rule = getattr(proxy, when)("submit", kill)
            assert put(port, "a") is None
            assert first.wait(10) == -9
            assert rule.happened.is_set()
        assert valkey.exists(f"{keys.JOB}a") == (when == "after")
        with api_process(valkey_url, port):
            second_answer, third_answer = put(port, "a"), put(port, "a")
            jobs = [get(f"http://127.0.0.1:{port}/v1/jobs/{job_id}?wait=20") for job_id in ("a", "acknowledged")]

    assert [found and found.status_code for found in (first_answer, second_answer, third_answer)] == [
        202,
        200 if when == "after" else 202,
        200,
    ]
    assert [job["status"] for job in jobs] == ["succeeded"] * 2
    for job in jobs:
        assert job["result"]["choices"][0]["text"] == answer("x", max_tokens=20)["choices"][0]["text"]
        assert (job["attempt"], valkey.xlen(f"{keys.RESULTS}{job['id']}")) == (1, 1)
    assert audit(valkey) == []


@pytest.mark.parametrize("name", ["submit", "WAITAOF"])
def test_a_submission_whose_reply_is_lost_is_repeated_with_its_id_and_is_one_job(
    valkey: redis.Redis, valkey_url: str, name: str
) -> None:
    with proxied(valkey_url) as proxy, front(proxy.url) as api:
        rule = proxy.after(name, cut)
        lost = api.put("/v1/jobs/a", json=BODY)
        again = api.put("/v1/jobs/a", json=BODY)

    assert rule.happened.is_set()
    assert (lost.status_code, again.status_code) == (503, 200)
    assert int(lost.headers["retry-after"]) >= 1
    assert valkey.lrange(keys.READY, 0, -1) == [b"a"]
    assert audit(valkey) == []


def test_the_202_waits_until_the_disk_has_said_so(valkey: redis.Redis, valkey_url: str) -> None:
    held, answers = Held(), list[int]()
    with proxied(valkey_url) as proxy, front(proxy.url) as api:
        proxy.after("WAITAOF", held)
        asking = threading.Thread(target=lambda: answers.append(api.put("/v1/jobs/a", json=BODY).status_code))
        asking.start()
        assert held.holding.wait(10), "nobody asked whether the disk has it"
        assert valkey.exists(f"{keys.JOB}a")
        asking.join(0.5)
        assert answers == []
        held.free.set()
        asking.join(10)

    assert answers == [202]


def test_what_the_disk_does_not_confirm_is_answered_503_and_may_be_repeated(
    valkey: redis.Redis, valkey_url: str
) -> None:
    with proxied(valkey_url) as proxy, front(proxy.url) as api:
        proxy.after("WAITAOF", lambda moment: b"*2\r\n:0\r\n:0\r\n")
        refused, repeated = (api.put("/v1/jobs/a", json=BODY) for _ in range(2))

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_durable")
    assert repeated.status_code == 200
    assert valkey.lrange(keys.READY, 0, -1) == [b"a"]


@pytest.mark.parametrize("offset", [HOUR, -HOUR])
def test_an_api_whose_clock_is_an_hour_wrong_keeps_deadlines_and_times(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path, offset: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRONG_CLOCK)
    port, body = free_port(), {**BODY, "deadline_seconds": 30}
    path = f"{tmp_path}:{environment('')['PYTHONPATH']}"
    with api_process(valkey_url, port, PYTHONPATH=path, CLOCK_OFFSET=str(offset)):
        url = f"http://127.0.0.1:{port}/v1/jobs"
        late = httpx2.post(url, json={**body, "deadline_seconds": 0.5}).json()["id"]
        time.sleep(0.6)
        job = httpx2.post(url, json=body).json()
        with worker(valkey_url, tmp_path, **TIMES):
            ended, expired = (get(f"{url}/{job_id}?wait=20") for job_id in (job["id"], late))

    assert (ended["status"], expired["status"]) == ("succeeded", "expired")
    assert abs(ended["created_at"] - time.time()) < 60
