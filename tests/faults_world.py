"""What the fault tests share: jobs whose answers are known, workers, who holds what, and the oracle."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from rq.job import Job
from rq.serializers import JSONSerializer

from core.request import Request, SamplingParams
from jobs import commands, keys
from jobs.job import NewJob
from jobs.memory import MemoryReport
from jobs.runner import Runner
from jobs.settings import StoreSettings
from tests.conftest import Server, start_valkey
from tests.jobs_world import audit
from tests.worker_world import WorkerProcess, answer, await_end, eventually, tokens, whole, worker

#: The times of these tests. A lost host costs at worst 1 + 0.2 + 0.5 + 0.2 s.
TIMES: dict[str, Any] = {"lease_seconds": 1.0, "tick_seconds": 0.2, "grace_seconds": 0.5}
WORST_SECONDS = 1.9
BUSY_SECONDS = 3.0  #: what a machine that does other things may take on top


@dataclass(frozen=True, slots=True)
class Asked:
    """A job, and what was asked for."""

    job: Job
    prompt: str
    params: dict[str, Any]

    @property
    def attempt(self) -> int:
        return int(self.job.connection.hget(f"{keys.JOB}{self.job.id}", "attempt") or 0)


def ask(client: redis.Redis, count: int, *, most: int = 60, least: int = 1, name: str = "job") -> list[Asked]:
    """Queue jobs of ``least`` to ``most`` tokens: greedy and drawn, with stop strings and log-probabilities."""
    runner, asked = Runner(client, 86_400), []
    for n in range(count):
        params: dict[str, Any] = {"max_tokens": least + n * 7 % (most - least + 1), "temperature": n % 2, "seed": n}
        params |= {"stop": ["7 w1"]} if n % 5 == 4 else {}
        params |= {"logprobs": n % 3} if n % 4 == 3 else {}
        prompt = f"{name} {n}"
        new = NewJob(id=f"{name}-{n}", request=Request(prompt=prompt, params=SamplingParams.from_wire(params)))
        runner.run(commands.submit(new, StoreSettings(), MemoryReport(used_bytes=0, limit_bytes=0)))
        asked.append(Asked(Job.fetch(new.id, connection=client, serializer=JSONSerializer), prompt, params))
    return asked


def undisturbed(asked: Iterable[Asked], client: redis.Redis, log: Path | None = None, seconds: float = 60) -> None:
    """Every job succeeded once, with a whole log and the result of an undisturbed run; nothing is left anywhere."""
    for each in asked:
        assert await_end(each.job, log, seconds) == "finished", each.prompt
        assert whole(each.job) == answer(each.prompt, **each.params), each.prompt
    assert audit(client) == []
    assert client.zcard(keys.WIP) == 0


@contextmanager
def crew(url: str, folder: Path, count: int, **changes: object) -> Iterator[list[WorkerProcess]]:
    """So many workers."""
    with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        starting = [worker(url, folder, **{**TIMES, **changes}) for _ in range(count)]
        yield list(pool.map(stack.enter_context, starting))


def holders(client: redis.Redis) -> dict[int, str]:
    """The engine processes that hold jobs now: pid -> name of the worker."""
    cards = Runner(client, 1).run(commands.workers())
    return {card.pid: card.name for card in cards if client.scard(f"{keys.HELD}{card.name}")}


def kill_holders(client: redis.Redis, seed: int, times: int, pause_seconds: float) -> list[float]:
    """SIGKILL a random engine process that holds jobs, so often; when each died."""
    chance, moments = random.Random(seed), list[float]()
    deadline = time.monotonic() + 30
    while len(moments) < times and time.monotonic() < deadline:
        if found := sorted(holders(client)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(found), signal.SIGKILL)
                moments.append(time.monotonic())
        time.sleep(pause_seconds * chance.uniform(0.5, 1.5))
    return moments


def running(asked: Sequence[Asked], *, least: int = 3) -> bool:
    """Each has published some tokens."""
    return all(tokens(each.job) >= least for each in asked)


def lose_host(process: WorkerProcess) -> None:
    """Parent and engine process die at once: nobody is left who could tell."""
    engine = process.engine_pid()
    os.kill(process.parent.pid, signal.SIGSTOP)  # or it might see the other one die
    os.kill(engine, signal.SIGKILL)
    process.parent.kill()


def seconds_until_resumed(asked: Sequence[Asked], since: float, log: Path | None = None) -> float:
    """From ``since`` until every job that had not ended has a token that it had not."""
    before = [(each.job, tokens(each.job)) for each in asked if each.job.get_status(refresh=True) != "finished"]
    assert before, "everything had ended: the test proves nothing"
    eventually(lambda: all(tokens(job) > count for job, count in before), "new tokens", log)
    return time.monotonic() - since


def restart(server: Server) -> Server:
    """SIGKILL a Valkey and start it again on its file."""
    server.process.kill()
    server.process.wait(10)
    return start_valkey(server.folder)


@contextmanager
def restartable(server: Server) -> Iterator[list[Server]]:
    """A list whose last server is the one that runs; those that a test adds are ended."""
    servers = [server]
    try:
        yield servers
    finally:
        for one in servers[1:]:
            one.process.kill()
            one.process.wait(10)


class Meanwhile:
    """Does things again and again in threads while the block runs; what one raises, the block's end raises."""

    def __init__(self, *acts: Any, pause_seconds: float = 0.01) -> None:
        self.rounds = [0] * len(acts)
        self._pause = pause_seconds
        self._end = threading.Event()
        self._failures: list[Exception] = []
        self._threads = [threading.Thread(target=self._repeat, args=(n, act)) for n, act in enumerate(acts)]

    def __enter__(self) -> Meanwhile:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(20)
        if self._failures and exc == (None, None, None):
            raise self._failures[0]

    def _repeat(self, number: int, act: Any) -> None:
        try:
            while not self._end.wait(self._pause):
                act()
                self.rounds[number] += 1
        except Exception as error:  # noqa: BLE001  # it is raised again where somebody sees it
            self._failures.append(error)


#: Everything there is, at one moment: key and what DUMP says of it.
DUMP_ALL = """#!lua flags=no-writes
local all = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  all[#all + 1] = {key, redis.call('DUMP', key)}
end
return all
"""


class Snapshots:
    """Copies of a server at one moment each, in another server, where nothing moves while one looks."""

    def __init__(self, source: redis.Redis, scratch: redis.Redis) -> None:
        self.scratch = scratch
        self._source = source

    def take(self) -> redis.Redis:
        """A client of the newest copy."""
        found: Any = self._source.eval(DUMP_ALL, 0)
        with self.scratch.pipeline(transaction=False) as pipeline:
            pipeline.flushdb()
            for key, value in found:
                pipeline.restore(key, 0, value, replace=True)
            pipeline.execute()
        return self.scratch
