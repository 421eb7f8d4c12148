"""Many eyes and many hands: duplicates, dashboards, reapers, wrong clocks. Nobody moves a job twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry, clean_registries
from rq.serializers import JSONSerializer

from jobs import keys
from jobs.store import Store
from tests.conftest import Server
from tests.faults_world import TIMES, Asked, Meanwhile, Snapshots, ask, crew, kill_holders, undisturbed
from tests.jobs_world import audit, settings
from tests.worker_world import ROOT, log_of, worker

HOUR = 3_600


@pytest.fixture
def snapshots(valkey: redis.Redis, own_valkey: Server) -> Iterator[Snapshots]:
    """Of the session's server, in one of their own."""
    with redis.Redis.from_url(own_valkey.url) as scratch:
        yield Snapshots(valkey, scratch)


def places(client: Any) -> dict[str, list[str]]:
    """Where each id stands: every list and registry in which it waits or runs."""
    found: dict[str, list[str]] = {}
    for key in (key.decode() for key in client.keys("rq:queue:*")):
        for job_id in client.lrange(key, 0, -1):
            found.setdefault(job_id.decode(), []).append(key)
    for member in client.zrange(keys.WIP, 0, -1):
        found.setdefault(member.decode().rpartition(":")[0], []).append(keys.WIP)
    for job_id in client.zrange(keys.SCHEDULED, 0, -1):
        found.setdefault(job_id.decode(), []).append(keys.SCHEDULED)
    return found


def look(snapshots: Snapshots) -> None:
    """Every unfinished job is in exactly the one place that its state names, and RQ's own counts agree."""
    client: Any = snapshots.take()
    assert audit(client) == []
    found, states = places(client), dict[str, str]()
    for key in client.keys(f"{keys.JOB}*"):
        job_id = key.decode().removeprefix(keys.JOB)
        states[job_id] = client.hget(key, "status").decode()
        if states[job_id] in ("queued", "started"):
            [place] = found[job_id]
            assert place.startswith("rq:queue:" if states[job_id] == "queued" else keys.WIP), (job_id, place)
    queue = Queue("generate", connection=client, serializer=JSONSerializer)
    counted = list(states.values()).count
    assert StartedJobRegistry(queue=queue).count == counted("started")
    assert FinishedJobRegistry(queue=queue).count == counted("finished")
    assert FailedJobRegistry(queue=queue).count == counted("failed") == 0
    waiting = sum(client.llen(key) for key in client.keys("rq:queue:*"))
    assert waiting >= counted("queued")  # ids of ended jobs stay until a claim drops them


def look_in(client: redis.Redis) -> None:
    """What dashboards and ``rq info`` do, and RQ's own clean-ups with it."""
    queue = Queue("generate", connection=client, serializer=JSONSerializer)
    StartedJobRegistry(queue=queue).count  # noqa: B018  # reading it cleans up
    StartedJobRegistry(queue=queue).cleanup(int(time.time()) + 400 * 86_400)
    client.delete(f"rq:clean_registries:{queue.name}")
    clean_registries(queue)
    for registry in (queue.finished_job_registry, queue.failed_job_registry):
        registry.get_job_ids()


def test_at_every_point_of_a_killing_run_each_job_is_where_its_state_says_and_rq_agrees(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path, snapshots: Snapshots
) -> None:
    reapers = [Store(settings(valkey_url)) for _ in range(2)]
    acts = [lambda: look(snapshots), lambda: look_in(valkey), *(store.reap for store in reapers)]
    with crew(valkey_url, tmp_path, 2, max_running=6) as workers, Meanwhile(*acts) as meanwhile:
        asked = ask(valkey, 60, least=30, most=100)
        assert len(kill_holders(valkey, seed=2, times=6, pause_seconds=0.3)) == 6
        undisturbed(asked, valkey, workers[0].log)
    for store in reapers:
        store.close()

    assert min(meanwhile.rounds) > 20, meanwhile.rounds
    assert max(each.attempt for each in asked) > 1


def test_an_id_that_is_queued_many_times_runs_once(valkey: redis.Redis, valkey_url: str, tmp_path: Path) -> None:
    with crew(valkey_url, tmp_path, 2) as workers:
        valkey.set("rq:suspended", 1)
        asked = ask(valkey, 40, most=30)
        for _ in range(3):
            valkey.rpush(keys.READY, *(each.job.id for each in asked))
        valkey.delete("rq:suspended")
        undisturbed(asked, valkey, workers[0].log)

    assert {each.attempt for each in asked} == {1}
    assert starts(asked) == [1] * 40


def starts(asked: list[Asked]) -> list[int]:
    """How often each was begun."""
    return [sum(event.type == "started" for event in log_of(each.job)) for each in asked]


#: Put before everything else on a process' path: its clocks are wrong by so many seconds.
WRONG_CLOCK = """
import datetime, os, time
OFFSET = float(os.environ["CLOCK_OFFSET"])
true, now = time.time, datetime.datetime.now
time.time = lambda: true() + OFFSET
time.time_ns = lambda: int(time.time() * 1e9)
class Wrong(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
    @classmethod
    def utcnow(cls):
        return cls.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)
datetime.datetime = Wrong
"""

MONITOR = """
import sys, time, redis
from rq import Queue
from rq.registry import StartedJobRegistry, clean_registries
from rq.serializers import JSONSerializer
client = redis.Redis.from_url(sys.argv[1])
queue = Queue("generate", connection=client, serializer=JSONSerializer)
print(time.time(), flush=True)
while True:
    client.delete("rq:clean_registries:generate")
    clean_registries(queue)
    StartedJobRegistry(queue=queue).count
    time.sleep(0.01)
"""


@pytest.mark.parametrize("offset", [HOUR, -HOUR])
def test_clocks_that_are_an_hour_wrong_change_nothing(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRONG_CLOCK)
    wrong = {**os.environ, "PYTHONPATH": str(tmp_path), "CLOCK_OFFSET": str(-offset)}
    command = [sys.executable, "-c", MONITOR, valkey_url]
    with subprocess.Popen(command, env=wrong, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        assert abs(float(monitor.stdout.readline()) - time.time() + offset) < 60, "its clock is right"
        with ExitStack() as stack:
            with monkeypatch.context() as skewed:
                skewed.setenv("CLOCK_OFFSET", str(offset))
                skewed.setattr("tests.worker_world.ROOT", f"{tmp_path}{os.pathsep}{ROOT}")
                early = stack.enter_context(worker(valkey_url, tmp_path, **TIMES))
            right = stack.enter_context(worker(valkey_url, tmp_path, **TIMES))
            asked = ask(valkey, 30, least=50, most=100)
            undisturbed(asked, valkey, right.log)
            assert time.strftime("%Y-%m-%d %H", time.localtime(time.time() + offset)) in early.log.read_text()
        monitor.kill()

    assert {each.attempt for each in asked} == {1}
    for each in asked:
        each.job.refresh()
        assert each.job.ended_at is not None
        assert abs(each.job.ended_at.timestamp() - time.time()) < 60
