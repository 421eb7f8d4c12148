"""A small world for tests of the worker: one in a thread, one as processes, and how to await things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import rq
from rq.job import Job
from rq.serializers import JSONSerializer

from core.instant import InstantConfig, InstantEngine
from core.protocol import EngineProtocol
from core.request import FinishedEvent, Request, SamplingParams
from jobs import commands
from jobs.reports import LoggedEvent
from jobs.runner import Runner
from jobs.settings import StoreSettings
from worker.engine_process import build
from worker.settings import WorkerSettings
from worker.stop import Stop

ROOT = Path(__file__).parent.parent

#: Fast enough for tests, slow enough for a busy machine: a lease is renewed every third of a second.
QUICK = {
    "lease_seconds": 1.0,
    "grace_seconds": 0.3,
    "tick_seconds": 0.1,
    "drain_seconds": 10,
    "instant_step_ms": 5,
    "publish_unread_seconds": 0,
}


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A parent and its engine process."""

    name: str  #: its processes are called after it
    parent: subprocess.Popen[bytes]
    log: Path
    client: Any

    def engine_pid(self) -> int:
        """The engine process that is registered now."""
        return int(eventually(lambda: next(iter(self.children()), 0), "an engine process"))

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.parent.pid}/task/{self.parent.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def kill_engine(self) -> None:
        os.kill(self.engine_pid(), signal.SIGKILL)

    def held(self) -> int:
        """Jobs that Redis says it holds."""
        return sum(self.client.scard(key) for key in self.client.keys(f"headrace:held:{self.name}-*"))

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
def worker(
    url: str, folder: Path, *, python: object = sys.executable, load_seconds: float = 90, **settings: object
) -> Iterator[WorkerProcess]:
    """A worker that is registered, and killed with its engine process if the test leaves it running."""
    client = redis.Redis.from_url(url)
    name = f"w{time.monotonic_ns()}"
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        command = [str(python), "-P", "-m", "worker"]
        environ = environment(url, worker_name=name, **settings)
        parent = subprocess.Popen(command, env=environ, stdout=out, stderr=out, cwd=folder)
    process = WorkerProcess(name, parent, log, client)
    try:
        registered = f"rq:worker:{name}-*"
        eventually(lambda: parent.poll() is not None or client.keys(registered), "registration", log, load_seconds)
        assert parent.poll() is None, log.read_text()[-4000:]
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


def eventually(read: Callable[[], Any], what: str = "change", log: Path | None = None, seconds: float = 30) -> Any:
    """What ``read`` gives once it gives something true; the worker's log is in the failure."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := read():
            return value
        time.sleep(0.01)
    raise AssertionError(f"no {what} within {seconds} s\n{log.read_text()[-4000:] if log else ''}")


def await_status(job: Job, *wanted: str, log: Path | None = None, seconds: float = 30) -> str:
    """The job's status in RQ's words, once it is one of these."""

    def read() -> str | None:
        status = str(job.get_status(refresh=True).value)
        return status if status in wanted else None

    return str(eventually(read, f"{' or '.join(wanted)} of {job.id}", log, seconds))


def await_end(job: Job, log: Path | None = None, seconds: float = 30) -> str:
    """The job's status in RQ's words, once it has ended."""
    return await_status(job, "finished", "failed", "stopped", "canceled", log=log, seconds=seconds)


def ended_alike(jobs: list[Job], log: Path | None = None, seconds: float = 60) -> None:
    """Every job has succeeded, with one result and one gapless log whose text is the result's."""
    for job in jobs:
        assert await_end(job, log, seconds) == "finished", job.id
        whole(job)


def log_of(job: Job) -> list[LoggedEvent]:
    """What a reader of the job's events sees."""
    return Runner(job.connection, 86_400).run(commands.events(job.id, -1))


def whole(job: Job) -> dict[str, Any]:
    """The job's one result as the API shows it; its log has every event once, and the texts of the result."""
    assert job.connection.xlen(f"rq:results:{job.id}") == 1
    events = log_of(job)
    result = Runner(job.connection, 86_400).run(commands.get(job.id)).job.result or {}
    assert [event.number for event in events] == list(range(len(events)))
    assert [event.type for event in events].count("finished") == 1
    for choice in result["choices"]:
        said = [event.fields for event in events if event.type == "token" and event.fields["index"] == choice["index"]]
        assert "".join(fields["text"] for fields in said) == choice["text"]
    return result


def answer(prompt: str, **params: Any) -> dict[str, Any]:
    """What an undisturbed run gives."""
    engine = InstantEngine()
    engine.add("x", Request(prompt=prompt, params=SamplingParams.from_wire(params)))
    while True:
        for event in engine.step():
            if isinstance(event, FinishedEvent):
                return event.result.to_wire()


def tokens(job: Job) -> int:
    """Tokens published so far, of all choices."""
    return sum(len(event.fields["token_ids"]) for event in log_of(job) if event.type == "token")


@contextmanager
def working(
    url: str, engine: EngineProtocol | None = None, *, step_ms: float = 2, name: str = "w1", **changes: Any
) -> Iterator[Stop]:
    """A worker in a thread of this process; it hands back at once what runs when the block ends."""
    quick: dict[str, Any] = {"lease_seconds": 1, "tick_seconds": 0.1, "drain_seconds": 0, "publish_unread_seconds": 0.2}
    settings = WorkerSettings(**{"engine": "instant", **quick, "worker_name": name, **changes})
    stop = Stop(settings.drain_seconds)
    engine = engine or InstantEngine(InstantConfig(step_seconds=step_ms / 1000))
    worker = build(settings, store_settings(url), engine, stop)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield stop
    finally:
        stop.request()
        thread.join(10)
        assert not thread.is_alive()


def store_settings(url: str) -> StoreSettings:
    return StoreSettings(redis_url=url, lease_seconds=1, grace_seconds=0.3)


def put(client: redis.Redis, prompt: str, **params: Any) -> Job:
    """What a program that has only rq does."""
    return put_wire(client, {"input": {"prompt": prompt}, "params": params})


def put_wire(client: redis.Redis, wire: dict[str, Any]) -> Job:
    queue = rq.Queue("generate", connection=client, serializer=JSONSerializer)
    return queue.enqueue("headrace.generate", wire)
