"""A doctor finds each job that is not in the one place its state names, mends it, and a healthy house has none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from jobs import keys
from jobs.doctor import examine
from jobs.job import FINAL, JobState
from jobs.store import Store
from tests.jobs_world import add, audit, born, done, failed, kill, pass_deadline, say, settings, take
from tests.worker_world import environment, put

S = JobState


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    """Jobs in every state: q, r (running at w), s, f, c, x, d (a dead letter)."""
    store = Store(settings(valkey_url, durability="memory"))
    add(store, "d")
    for _ in range(3):
        born(store)
        take(store)
        kill(store)
    born(store)
    for job_id in ("s", "f", "c", "x"):
        add(store, job_id, deadline_seconds=60)
    for job in take(store, room=2):
        store.report([say(job, 1)], [done(job) if job.id == "s" else failed(job)])
    store.cancel("c")
    pass_deadline(store.connection, "x")
    store.expire()
    add(store, "r")
    [job] = take(store)
    store.report([say(job, 1)], [])
    add(store, "q")
    yield store
    store.close()


def hit(name: str, *args: Any) -> Callable[[redis.Redis], object]:
    return lambda client: getattr(client, name)(*args)


BREAKS: dict[str, tuple[str, Callable[[redis.Redis], object]]] = {
    "a queued job is in no list": ("q", hit("lrem", keys.READY, 0, "q")),
    "a queued job is in a list twice": ("q", hit("rpush", keys.READY, "q")),
    "a queued job is in two lists": ("q", hit("rpush", keys.SUSPECTS, "q")),
    "a queued job is scheduled, too": ("q", hit("zadd", keys.SCHEDULED, {"q": 4e9})),
    "a running job is not in progress": ("r", hit("zrem", keys.WIP, "r:1")),
    "a running job is not its worker's": ("r", hit("srem", f"{keys.HELD}w", "r:1")),
    "a running job has no execution": ("r", hit("delete", f"{keys.EXECUTION}r:1")),
    "a running job's worker has no lease": ("r", hit("zrem", keys.LEASES, "w")),
    "an ended job is in progress": ("s", hit("zadd", keys.WIP, {"s:1": 4e9})),
    "an ended job is in no registry": ("s", hit("zrem", keys.FINISHED, "s")),
    "an ended job is in two registries": ("f", hit("zadd", keys.CANCELED, {"f": 4e9})),
    "a cancelled job counts as queued": ("c", hit("zadd", f"{keys.INDEX}generate:queued", {"c": 1})),
    "an expired job is in no index": ("x", hit("zrem", f"{keys.INDEX}generate:expired", "x")),
    "a dead letter is not among them": ("d", hit("zrem", keys.DEAD, "d")),
    "an index entry without a job": ("ghost", hit("zadd", f"{keys.INDEX}generate:succeeded", {"ghost": 1})),
    "an execution without a job": ("ghost", hit("zadd", keys.WIP, {"ghost:1": 4e9})),
    "a job's hash is gone": ("s", hit("delete", f"{keys.JOB}s")),
}


def test_nothing_is_found_in_a_healthy_house(store: Store) -> None:
    diagnosis = examine(store, fix=True)

    assert (diagnosis.findings, diagnosis.healthy) == ([], True)
    assert diagnosis.jobs == {"queued": 1, "running": 1, "succeeded": 1, "failed": 2, "cancelled": 1, "expired": 1}
    assert (diagnosis.workers, diagnosis.dead_letters) == (1, 1)
    assert [note for note in diagnosis.notes if "dead letter" in note]


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found_by_name_and_mended(store: Store, valkey: redis.Redis, name: str) -> None:
    victim, wreck = BREAKS[name]
    wreck(valkey)
    seen = audit(valkey)
    found = examine(store, fix=False)
    fixed = examine(store, fix=True)
    again = examine(store, fix=False)

    assert [problem for problem in seen if problem.startswith(f"{victim}:")] == seen != []
    assert {finding.what for finding in found.findings} <= {victim, "w"} != set()
    assert not found.healthy
    assert fixed.healthy
    assert again.findings == []
    assert audit(valkey) == []


@pytest.mark.parametrize("name", BREAKS)
def test_every_job_ends_after_it_was_mended(store: Store, valkey: redis.Redis, name: str) -> None:
    _, wreck = BREAKS[name]
    wreck(valkey)
    examine(store, fix=True)
    kill(store)
    born(store)
    for _ in range(3):
        for job in take(store):
            store.report([], [done(job)])

    assert {job.state for job in store.list(limit=50)} <= FINAL
    assert store.get("q").state is store.get("r").state is S.SUCCEEDED
    assert valkey.zcard(keys.WIP) == 0
    assert audit(valkey) == []


def test_jobs_of_other_queues_are_nobodys_business_here(store: Store, valkey: redis.Redis) -> None:
    valkey.hset(f"{keys.JOB}theirs", mapping={"status": "queued", "origin": "mail"})

    assert examine(store, fix=True).findings == []
    assert valkey.hget(f"{keys.JOB}theirs", "status") == b"queued"


def test_what_stock_rq_put_in_is_in_its_place_before_anybody_looked_at_it(store: Store, valkey: redis.Redis) -> None:
    job = put(valkey, "x")
    found = audit(valkey), examine(store, fix=True).findings
    store.get(job.id)

    assert found == ([], [])
    assert audit(valkey) == []


def doctor(url: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "jobs", "doctor", *flags]
    return subprocess.run(command, env=environment(url), cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_program_says_what_is_wrong_and_mends_it(
    store: Store, valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    valkey.lrem(keys.READY, 0, "q")
    found = doctor(valkey_url, tmp_path)
    fixed = doctor(valkey_url, tmp_path, "--fix", "--json")
    again = doctor(valkey_url, tmp_path)

    assert found.returncode == 1
    assert "q: queued, and is in no list" in found.stdout
    assert "--fix" in found.stdout
    assert fixed.returncode == 0
    assert json.loads(fixed.stdout)["findings"][0]["done"] == "put it at the front of the queue, once"
    assert (again.returncode, "every job is in the one place" in again.stdout) == (0, True)


def test_the_program_says_that_no_redis_is_there(tmp_path: Path) -> None:
    run = doctor("unix:///nowhere/valkey.sock", tmp_path)

    assert run.returncode == 3
    assert "doctor: the job store is unavailable" in run.stderr


@pytest.mark.parametrize("flags", [("--mend",), ("now",)])
def test_the_program_takes_no_other_word(tmp_path: Path, flags: tuple[str, ...]) -> None:
    run = doctor("unix:///nowhere/valkey.sock", tmp_path, *flags)

    assert (run.returncode, "usage:" in run.stderr) == (2, True)


def test_a_job_whose_time_is_over_is_no_finding_until_the_next_tick_forgets_it(store: Store) -> None:
    client: Any = store.connection
    client.delete(f"{keys.JOB}s")
    found = [finding.what for finding in examine(store, fix=False).findings]
    client.zadd(keys.RETENTION, {"s": 1})  # Redis was quicker than the tick

    assert found == ["s"]
    assert (audit(client), examine(store, fix=False).findings) == ([], [])
    store.expire()
    assert client.zscore(keys.FINISHED, "s") is None
    assert client.zscore(f"{keys.INDEX}generate:succeeded", "s") is None
