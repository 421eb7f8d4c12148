"""Mixed load over HTTP and through stock RQ: patient clients that check what each job comes to."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
import redis
import rq
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from benchmarks.chaos.house import House, patiently
from core.instant import InstantEngine
from core.request import FinishedEvent, Request, SamplingParams
from headrace.client import Client
from headrace.errors import ClientError, Conflict, NotFound
from headrace.patience import Patience
from jobs import keys

PATIENT = Patience(busy_seconds=300, broken_tries=40, broken_pause_seconds=0.1)
END_SECONDS = 120.0  #: a job that has not ended by then is lost
POISON = "!crash"  #: kills the process of the instant engine
CUT_SECONDS = 0.5  #: a cut stream lasts so long


def answer(prompt: str, params: Mapping[str, Any]) -> str:
    """The text of an undisturbed run of the instant engine."""
    engine = InstantEngine()
    engine.add("x", Request(prompt=prompt, params=SamplingParams.from_wire(params)))
    while True:
        for event in engine.step():
            if isinstance(event, FinishedEvent):
                return str(event.result.to_wire()["choices"][0]["text"])


@dataclass(frozen=True, slots=True)
class Asked:
    """One job: its id, what was asked, and a client to ask with."""

    id: str
    prompt: str
    params: dict[str, Any]

    @property
    def body(self) -> dict[str, Any]:
        return {"kind": "generate", "input": {"prompt": self.prompt}, "params": self.params}


class Load:
    """Threads that each ask for one job after another and see it end."""

    def __init__(self, house: House, seed: int, threads: int) -> None:
        self.violations: list[str] = []
        self.ended: dict[str, int] = {}  #: by way and status
        self._house = house
        self._numbers = itertools.count()
        self._seed = seed
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(threads)]

    @property
    def jobs(self) -> int:
        return sum(self.ended.values())

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Ask for nothing more, and see the end of what was asked for."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * END_SECONDS)
            if thread.is_alive():
                self.violations.append("a client still waits for its job")

    def _run(self, number: int) -> None:
        chance = random.Random(self._seed * 1_000 + number)
        with Client(self._house.url, patience=PATIENT) as client:
            while not self._stop.is_set():
                name, act = chance.choices(*zip(*((way, weight) for *way, weight in WAYS), strict=True))[0]
                self._one(name, lambda asked, act=act: act(self, client, asked), chance)  # type: ignore[misc]

    def _one(self, name: str, act: Callable[[Asked], str], chance: random.Random) -> None:
        asked = self._draw(name, chance)
        try:
            status = act(asked)
        except (ClientError, AssertionError, redis.RedisError, httpx2.HTTPError) as error:
            status = "violated"
            self.violations.append(f"{name} {asked.id}: {type(error).__name__}: {str(error)[:300]}")
        with self._lock:
            self.ended[f"{name}: {status}"] = self.ended.get(f"{name}: {status}", 0) + 1

    def _draw(self, name: str, chance: random.Random) -> Asked:
        number = next(self._numbers)
        params: dict[str, Any] = {"max_tokens": chance.randint(1, 300), "temperature": chance.choice((0, 0.8))}
        params |= {"seed": number} if params["temperature"] else {}
        params |= {"stop": [f"{chance.randint(0, 9)} w{chance.randint(0, 9)}"]} if chance.random() < 0.3 else {}
        params |= {"logprobs": chance.randint(0, 2)} if chance.random() < 0.2 else {}
        return Asked(f"{name}-{number}", f"chaos {self._seed} {number}", params)

    # -- the ways to ask

    def wait(self, client: Client, asked: Asked) -> str:
        client.submit(asked.body, job_id=asked.id)
        client.wait(asked.id, END_SECONDS)
        return self._check(client, asked, "succeeded")

    def stream(self, client: Client, asked: Asked) -> str:
        """Read through connections that are cut, and then once more in one go."""
        client.submit(asked.body, job_id=asked.id)
        seen: list[tuple[int, str]] = []
        deadline = time.monotonic() + END_SECONDS
        while not seen or seen[-1][1] != "finished":
            assert time.monotonic() < deadline, "the stream does not end"
            cut_at = time.monotonic() + CUT_SECONDS
            for event in client.events(asked.id, seen[-1][0] if seen else -1):
                seen.append((event.number, event.type))
                if time.monotonic() > cut_at:
                    break
        again = [(event.number, event.type) for event in client.events(asked.id)]
        assert seen == again, f"read {len(seen)} events, and afterwards {len(again)}: {again}"
        return self._check(client, asked, "succeeded")

    def cancel(self, client: Client, asked: Asked) -> str:
        long = Asked(asked.id, asked.prompt, {**asked.params, "max_tokens": 2_000})
        client.submit(long.body, job_id=long.id)
        time.sleep(0.3)
        with contextlib.suppress(Conflict):  # it has ended
            client.cancel(long.id)
        client.wait(long.id, END_SECONDS)
        return self._check(client, long, "cancelled", "succeeded")

    def deadline(self, client: Client, asked: Asked) -> str:
        long = Asked(asked.id, asked.prompt, {**asked.params, "max_tokens": 2_000})
        client.submit({**long.body, "deadline_seconds": 1.0}, job_id=long.id)
        client.wait(long.id, END_SECONDS)
        return self._check(client, long, "expired", "succeeded")

    def poison(self, client: Client, asked: Asked) -> str:
        bad = Asked(asked.id, POISON, {"max_tokens": 10})
        client.submit(bad.body, job_id=bad.id)
        job = client.wait(bad.id, END_SECONDS)
        assert (job.error or {}).get("code") == "poison_job", job.wire
        return self._check(client, bad, "failed")

    def stock(self, client: Client, asked: Asked) -> str:
        """A program that has only rq: it enqueues with an id of its own, and looks before it repeats."""
        while not patiently(lambda: RqJob.exists(asked.id, connection=self._house.redis)):
            patiently(lambda: self._enqueue(asked))
        client.wait(asked.id, END_SECONDS)
        return self._check(client, asked, "succeeded")

    def _enqueue(self, asked: Asked) -> None:
        if not RqJob.exists(asked.id, connection=self._house.redis):
            queue = rq.Queue("generate", connection=self._house.redis, serializer=JSONSerializer)
            wire = {"input": {"prompt": asked.prompt}, "params": asked.params}
            queue.enqueue("headrace.generate", wire, job_id=asked.id)

    # -- the oracle

    def _check(self, client: Client, asked: Asked, *statuses: str) -> str:
        """The job's end is one of these, with one result, a whole log, and the text of an undisturbed run."""
        job = client.get(asked.id)
        assert job.status in statuses, job.wire
        log = list(client.events(asked.id))
        assert [event.number for event in log] == list(range(len(log))), "the log has holes"
        assert [event.type for event in log].count("finished") == 1, "the log has no one end"
        text = "".join(event.text for event in log)
        expected = "" if asked.prompt == POISON else answer(asked.prompt, asked.params)  # it would kill us, too
        if job.succeeded:
            assert (job.text, text) == (expected, expected), f"{text!r} and {job.text!r}, not {expected!r}"
        else:
            assert expected.startswith(text), f"{text!r} is no beginning of {expected!r}"
        results = patiently(lambda: self._house.redis.xrange(f"{keys.RESULTS}{asked.id}"))
        assert sum(row[b"type"] == b"1" for _, row in results) == job.succeeded, results
        with contextlib.suppress(NotFound):  # a repeat of our own
            client.delete(asked.id)
        return job.status


#: A way to ask, what it does, and how often of 1,000.
WAYS: tuple[tuple[str, Callable[[Load, Client, Asked], str], float], ...] = (
    ("wait", Load.wait, 600),
    ("stream", Load.stream, 150),
    ("stock", Load.stock, 100),
    ("cancel", Load.cancel, 80),
    ("deadline", Load.deadline, 67),
    ("poison", Load.poison, 3),
)
