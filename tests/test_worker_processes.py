"""``python -m worker`` as processes, with real signals and a real Valkey: who is killed, what goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer

from core.instant import InstantEngine
from core.request import FinishedEvent, Request, SamplingParams
from tests.conftest import Server, start_valkey

ROOT = Path(__file__).parent.parent

#: Fast enough for tests, slow enough for a busy machine: a lease is renewed every third of a second.
QUICK = {"lease_seconds": 1.0, "grace_seconds": 0.3, "tick_seconds": 0.1, "drain_seconds": 10, "instant_step_ms": 5}


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A parent and its engine process."""

    parent: subprocess.Popen[bytes]
    log: Path
    client: Any

    def engine_pid(self) -> int:
        """The engine process that is registered now."""
        return int(await_value(lambda: next(iter(self.children()), None), "an engine process"))

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.parent.pid}/task/{self.parent.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def kill_engine(self) -> None:
        os.kill(self.engine_pid(), signal.SIGKILL)

    def stop(self, seconds: float = 20) -> int:
        """SIGTERM; the exit code."""
        self.parent.terminate()
        return self.parent.wait(seconds)


def environment(url: str, **settings: object) -> dict[str, str]:
    """A process's environment with these settings and no other of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    ours = {f"HEADRACE_{name.upper()}": str(value) for name, value in {**QUICK, **settings}.items()}
    return {**kept, "HEADRACE_REDIS_URL": url, "HEADRACE_ENGINE": "instant", "PYTHONPATH": str(ROOT), **ours}


@contextmanager
def worker(url: str, folder: Path, **settings: object) -> Iterator[WorkerProcess]:
    """A worker that is registered, and killed with its engine process if the test leaves it running."""
    client = redis.Redis.from_url(url)
    before = set(client.smembers("rq:workers"))
    log = folder / f"worker-{time.monotonic_ns()}.log"
    with log.open("wb") as out:
        command = [sys.executable, "-P", "-m", "worker"]
        parent = subprocess.Popen(command, env=environment(url, **settings), stdout=out, stderr=out, cwd=folder)
    process = WorkerProcess(parent, log, client)
    try:
        await_true(
            lambda: parent.poll() is not None or set(client.smembers("rq:workers")) - before, "registration", log
        )
        yield process
    finally:
        children = process.children() if parent.poll() is None else []
        parent.kill()
        parent.wait(10)
        for pid in children:
            kill_if_there(pid)
        client.close()


def kill_if_there(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def await_true(condition: Callable[[], object], what: str, log: Path | None = None, seconds: float = 30) -> None:
    await_value(lambda: condition() or None, what, log, seconds)


def await_value(read: Callable[[], Any], what: str, log: Path | None = None, seconds: float = 30) -> Any:
    """What ``read`` gives once it is not None; the worker's log is in the failure."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (value := read()) is not None:
            return value
        time.sleep(0.01)
    raise AssertionError(f"no {what} within {seconds} s\n{log.read_text()[-4000:] if log else ''}")


def enqueue(client: Any, prompt: str, *, kind: str = "generate", **params: Any) -> Job:
    """What a program that has only rq does."""
    queue = Queue("generate", connection=client, serializer=JSONSerializer)
    return queue.enqueue(f"headrace.{kind}", {"input": {"prompt": prompt}, "params": params})


def await_end(job: Job, log: Path | None = None, seconds: float = 30) -> str:
    """The status in RQ's words, once the job has ended."""

    def read() -> str | None:
        status = str(job.get_status(refresh=True).value)
        return status if status in ("finished", "failed", "stopped", "canceled") else None

    return str(await_value(read, f"end of {job.id}", log, seconds))


def ended_alike(jobs: list[Job], log: Path | None = None, seconds: float = 60) -> None:
    """Every job has succeeded, with one result and one gapless log whose text is the result's."""
    for job in jobs:
        assert await_end(job, log, seconds) == "finished", job.id
        whole(job)


def whole(job: Job) -> dict[str, Any]:
    """The job's one result; its log has every event once."""
    client = job.connection
    assert client.xlen(f"rq:results:{job.id}") == 1
    value: dict[str, Any] = job.return_value()
    entries = client.xrange(f"headrace:events:{job.id}")
    assert [entry_id for entry_id, _ in entries] == [f"{n + 1}-0".encode() for n in range(len(entries))]
    assert "".join(fields.get(b"t", b"").decode() for _, fields in entries) == value["choices"][0]["text"]
    assert [b"f" in fields for _, fields in entries].count(True) == 1
    return value


def answer(prompt: str, **params: Any) -> dict[str, Any]:
    """What an undisturbed run gives."""
    engine = InstantEngine()
    engine.add("x", Request(prompt=prompt, params=SamplingParams.from_wire(params)))
    while True:
        for event in engine.step():
            if isinstance(event, FinishedEvent):
                return event.result.to_wire()


def tokens(job: Job) -> int:
    """Token events published so far."""
    return sum(b"t" in fields for _, fields in job.connection.xrange(f"headrace:events:{job.id}"))


def test_a_killed_engine_process_costs_its_jobs_two_seconds_and_no_token(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path, lease_seconds=30, grace_seconds=30, instant_step_ms=20) as process:
        jobs = [enqueue(process.client, f"job {n}", max_tokens=150) for n in range(5)]
        await_true(lambda: all(tokens(job) > 10 for job in jobs), "tokens", process.log)
        before = {job.id: tokens(job) for job in jobs}
        killed = time.monotonic()
        process.kill_engine()
        await_true(lambda: all(tokens(job) > before[job.id] + 5 for job in jobs), "new tokens", process.log)
        seconds = time.monotonic() - killed
        ended_alike(jobs, process.log)

    assert seconds < 4, seconds  # 2 on a machine that does nothing else
    for n, job in enumerate(jobs):
        assert whole(job) == answer(f"job {n}", max_tokens=150)


def test_two_workers_share_a_queue_and_one_dies_half_way(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path) as first, worker(valkey_url, tmp_path) as second:
        params: list[dict[str, Any]] = [{"max_tokens": 1 + n % 60, "temperature": n % 2, "seed": n} for n in range(200)]
        jobs = [enqueue(first.client, f"job {n}", **params[n]) for n in range(200)]
        await_true(lambda: first.client.zcard("rq:finished:generate") > 60, "half of the jobs", first.log)
        first.kill_engine()
        ended_alike(jobs, second.log)
        attempts = [int(first.client.hget(f"rq:job:{job.id}", "attempt")) for job in jobs]
        for n, job in enumerate(jobs):
            assert job.return_value() == answer(f"job {n}", **params[n])

    assert max(attempts) > 1, "the kill hit no running job: the test proved nothing"
    assert first.client.zcard("rq:failed:generate") == 0


def test_a_poison_job_is_a_dead_letter_after_three_deaths_and_harms_nobody(valkey_url: str, tmp_path: Path) -> None:
    with worker(valkey_url, tmp_path, instant_step_ms=2) as process:
        before = [enqueue(process.client, f"before {n}", max_tokens=40) for n in range(10)]
        poison = enqueue(process.client, "!crash")
        after = [enqueue(process.client, f"after {n}", max_tokens=40) for n in range(10)]
        assert await_end(poison, process.log) == "failed"
        ended_alike(before + after, process.log)
        deaths = process.log.read_text().count("died: signal SIGKILL")
        error = json.loads(process.client.hget(f"rq:job:{poison.id}", "error"))

    assert deaths == 3
    assert error["code"] == "poison_job"


def test_sigterm_finishes_what_fits_and_hands_back_the_rest_in_order_with_its_tokens(
    valkey_url: str, tmp_path: Path
) -> None:
    with worker(valkey_url, tmp_path, drain_seconds=1, instant_step_ms=20, max_running=4) as process:
        short = enqueue(process.client, "short", max_tokens=20)
        long = [enqueue(process.client, f"long {n}", max_tokens=400) for n in range(3)]
        queued = [enqueue(process.client, f"queued {n}", max_tokens=5) for n in range(3)]
        await_true(lambda: tokens(long[2]) > 5, "tokens", process.log)
        code = process.stop()
        order = process.client.lrange("rq:queue:generate", 0, -1)
        kept = {job.id: tokens(job) for job in long}
        crashes = [process.client.hget(f"rq:job:{job.id}", "crashes") for job in long]
        workers = process.client.smembers("rq:workers")

    assert code == 0
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
        job = enqueue(process.client, "long", max_tokens=4000)
        await_true(lambda: tokens(job) > 5, "tokens", process.log)
        process.parent.terminate()
        time.sleep(0.5)
        start = time.monotonic()
        code = process.stop()

    assert code == 0
    assert time.monotonic() - start < 3
    assert job.get_status(refresh=True) == "queued"


def test_redis_may_die_and_come_back_while_jobs_run(own_valkey: Server, tmp_path: Path) -> None:
    with worker(own_valkey.url, tmp_path, lease_seconds=5, instant_step_ms=10) as process:
        jobs = [enqueue(process.client, f"job {n}", max_tokens=100) for n in range(40)]
        await_true(lambda: tokens(jobs[0]) > 5, "tokens", process.log)
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
