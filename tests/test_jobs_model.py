"""A seeded random walk over everything that can happen to jobs, checked at each step, and mutants that it must find.

Zombies, lost replies, duplicates, dashboards on a fast clock and stock RQ's own tools take part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job as RqJob
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from core.errors import EngineError, JobConflict, JobNotFound
from core.request import Request
from jobs import commands, keys, scripting
from jobs.audit import audit, close_look
from jobs.job import FINAL, MOVES, Job, JobState, NewJob, Resume
from jobs.logs import read_log
from jobs.store import ClaimedJob, LoggedEvent, Outcome, Store
from tests.conftest import start_valkey
from tests.jobs_world import (
    CARD,
    born,
    ended,
    failed,
    kill,
    outlast_grace,
    pass_deadline,
    result,
    say,
    settings,
    take,
    wipe_lease,
)
from tests.jobs_world import said as said_by

S = JobState
STEPS = int(os.environ.get("HEADRACE_MODEL_STEPS", "5000"))
#: Two compute alike, one otherwise: what it may go on with, a job's resume policy and its readers decide.
WORKERS = {"w": CARD, "v": CARD, "u": dataclasses.replace(CARD, dtype="bfloat16")}
JOBS = 12  #: at a time


class Walk:
    """What the workers believe they hold, and what the jobs were when last seen."""

    def __init__(self, store: Store, seed: int) -> None:
        self.store = store
        self.client: Any = store.connection
        self.random = random.Random(seed)
        self.held: dict[str, dict[str, ClaimedJob]] = {name: {} for name in WORKERS}
        self.zombies: list[ClaimedJob] = []  #: what dead or swept workers still believe
        self.states: dict[str, JobState] = {}
        self.attempts: dict[str, int] = {}
        self.ids: list[str] = []
        self.made = 0
        self.read: dict[str, str] = {}  #: unfinished answers somebody has read -> identity of the engine that began
        self.seen: dict[str, Any] = {}  #: what Redis answered last about a job and its log
        self.by_rq: set[str] = set()  #: ids that stock RQ moved, and nobody has looked at since
        self.pushed: set[str] = set()  #: ids that may be in a list once more, by stock RQ's doing

    def step(self) -> str:
        """Do one random thing."""
        act = self.random.choices(list(ACTS), [weight for weight, _ in ACTS.values()])[0]
        with contextlib.suppress(JobConflict, JobNotFound, NoSuchJobError, InvalidJobOperation):
            ACTS[act][1](self)
        return act

    def check(self, act: str, whole: bool) -> None:
        """Every move was in the table, no fence fell, nothing cancelled waits, all is in its place and every log whole.

        ``whole``: also of what nobody remembers.
        """
        for job_id, job, events in self.peek_at_all():
            if job is None:
                self.forget(job_id)
                continue
            before = self.states[job_id]
            assert job.state in reachable(before, act), f"{job_id}: {before} -> {job.state}"
            assert job.attempt >= self.attempts[job_id], f"{job_id}: the fence fell"
            assert not (job.state is S.QUEUED and job.cancel_requested), f"{job_id}: cancelled, and waits"
            self.states[job_id], self.attempts[job_id] = job.state, job.attempt
            if job.state in FINAL:
                self.read.pop(job_id, None)
            told = [event.fields["token_ids"][0] for event in events if event.type == "token"]
            assert told == list(range(len(told))), f"{job_id}: {told}"
        for job_id in self.ids if whole else ():
            self.store.get(job_id)  # mends what stock RQ left behind: it knows nothing of index and log
        self.by_rq -= set(self.ids) if whole else set()
        found = audit(self.client) if whole else self.look()
        assert [problem for problem in found if not self.left_by_rq(problem)] == []

    def look(self) -> list[str]:
        found = close_look(self.client, set(self.ids) - self.by_rq)
        return [f"{job_id}: {problem}" for job_id, problems in found for problem in problems]

    def peek_at_all(self) -> Iterator[tuple[str, Job | None, list[LoggedEvent]]]:
        """Every job and its log that are not as they were, in one round trip; None: it is forgotten."""
        reads = [command for job_id in self.ids for command in (commands.get(job_id), commands.events(job_id, -1))]
        answers = iter(self.store._runner.answers(reads) if reads else ())
        for job_id in list(self.ids):
            row, log = next(answers), next(answers)
            seen = (row and row[:-2], log)  # without the counter behind queue positions, and the id
            if self.seen.get(job_id) == seen:
                continue
            self.seen[job_id] = seen
            yield job_id, commands.get(job_id).decode(row).job if row else None, read_log(log)

    def left_by_rq(self, problem: str) -> bool:
        """Stock RQ may put an id into the queue twice: the second falls out when it is claimed."""
        return problem.partition(":")[0] in self.pushed and "queued, and is in [" in problem

    def peek(self, job_id: str) -> Job:
        """The job as it is; ``Store.get`` would mend what stock RQ left behind."""
        return self.store._runner.run(commands.get(job_id)).job

    def forget(self, job_id: str) -> None:
        self.ids.remove(job_id)
        del self.states[job_id], self.attempts[job_id]
        self.read.pop(job_id, None)

    # -- acts

    def submit(self) -> None:
        if len(self.ids) < JOBS:
            self.made += 1
            job_id = f"j{self.made}"
            deadline = 60.0 if self.random.random() < 0.3 else None
            resume = self.random.choice(list(Resume))
            self.store.submit(NewJob(id=job_id, request=Request(prompt="x"), deadline_seconds=deadline, resume=resume))
            if self.random.random() < 0.2:
                self.client.hset(f"{keys.JOB}{job_id}", mapping={"retries_left": 2, "retry_intervals": "[0, 5]"})
            self.ids.append(job_id)
            self.states[job_id], self.attempts[job_id] = S.QUEUED, 0

    def submit_again(self) -> None:
        if self.ids:
            assert not self.store.submit(NewJob(id=self.any_id(), request=Request(prompt="x"))).created

    def claim(self) -> None:
        name = self.any_worker()
        mine = self.held[name]
        jobs = take(self.store, name, self.random.randint(1, 4), len(mine), card=WORKERS[name])
        for job in jobs:
            assert job.attempt > self.attempts[job.id], f"{job.id}: claimed without raising the fence"
            if job.id in self.read and self.peek(job.id).resume is not Resume.ANY:
                assert self.read[job.id] == WORKERS[name].identity, f"{job.id}: another engine went on"
        if self.random.random() < 0.8:  # else the reply is lost, and the next beat tells
            mine.update({job.id: job for job in jobs})

    def publish(self) -> None:
        if (found := self.any_held()) is None:
            return
        name, job = found
        said = len(said_by(self.store, job.id))
        logged = self.store.events(job.id)
        first = logged[-1].number + 1 if logged else job.next_event
        number = self.random.randint(1, 3)
        publication = say(job, *range(said, said + number), first=first)
        for _ in range(self.random.choice((1, 1, 2))):
            if job.id in self.store.report([publication], []).refused:
                self.held[name].pop(job.id, None)

    def settle(self) -> None:
        if (found := self.any_held()) is None:
            return
        name, job = found
        answers = {self.end(job) for _ in range(self.random.choice((1, 2, 3)))}
        assert len(answers) == 1, "said again, and answered otherwise"
        del self.held[name][job.id]
        self.zombies.append(job)

    def end(self, job: ClaimedJob, outcome: Outcome | None = None) -> bool:
        """Settle; whether it was refused."""
        outcome = outcome or self.random.choice([Outcome.SUCCEEDED, *Outcome])
        error = self.random.choice([None, EngineError("again")])
        settlement = failed(job, error) if outcome is Outcome.FAILED else ended(job, outcome, result())
        return job.id in self.store.report([], [settlement]).refused

    def zombie(self) -> None:
        """Somebody who lost a job speaks about it: refused and without effect, but for a late result."""
        if not self.zombies:
            return
        job = self.random.choice(self.zombies[-20:])
        try:
            before = self.peek(job.id)
        except JobNotFound:
            return
        settled = self.client.hget(f"{keys.JOB}{job.id}", "settled") == str(job.attempt).encode()
        what = self.random.choice(["release", "publish", *Outcome])
        if what == "release":
            self.store.release([(job.id, job.attempt)])
        elif what == "publish":
            refused = self.publish_again(job)
            assert refused in (None, before.attempt != job.attempt or before.state in FINAL) or settled
        else:
            refused = self.end(job, Outcome(what))
            late = before.attempt == job.attempt and before.state is S.QUEUED and what == Outcome.SUCCEEDED
            running = before.attempt == job.attempt and before.state is S.RUNNING
            assert refused == (not (late or running or (settled and before.attempt == job.attempt)))
            if refused:
                assert self.peek(job.id).state is before.state

    def publish_again(self, job: ClaimedJob) -> bool | None:
        """Say all that an attempt said, and one token more; whether it was refused."""
        logged = [event for event in self.store.events(job.id) if event.type == "token"]
        before = sum(event.number < job.next_event for event in logged)
        try:
            said = say(job, *range(before, len(logged) + 1), first=job.next_event)
            return job.id in self.store.report([said], []).refused
        except redis.ResponseError:  # a hole: the log began anew meanwhile
            return None

    def release(self) -> None:
        if (found := self.any_held()) is not None:
            name, job = found
            del self.held[name][job.id]
            self.store.release([(job.id, job.attempt)] * self.random.choice((1, 2)))
            self.zombies.append(job)

    def die(self) -> None:
        name = self.any_worker()
        self.bury(name)
        kill(self.store, name)
        born(self.store, name, card=WORKERS[name])

    def fall_silent(self) -> None:
        name = self.any_worker()
        wipe_lease(self.client, name)
        self.store.reap()
        if self.random.random() < 0.5:
            outlast_grace(self.client, name)
            self.store.reap()
            self.bury(name)
        born(self.store, name, card=WORKERS[name])

    def bury(self, name: str) -> None:
        self.zombies += self.held[name].values()
        self.held[name].clear()

    def renew(self) -> None:
        name = self.any_worker()
        beat = self.store.renew(name, "busy", {job.id: job.attempt for job in self.held[name].values()}, {})
        for job_id in beat.lost:
            self.zombies.append(self.held[name].pop(job_id))
        self.store.release(beat.unknown)

    def cancel(self) -> None:
        if self.ids:
            self.store.cancel(self.any_id())

    def retry(self) -> None:
        if self.ids:
            self.store.retry(self.any_id())

    def delete(self) -> None:
        over = [job_id for job_id in self.ids if self.states[job_id] in FINAL]
        if len(over) > 4:
            self.store.delete(over[0])

    def expire(self) -> None:
        if self.ids:
            job_id = self.any_id()
            if self.client.hexists(f"{keys.JOB}{job_id}", "deadline_at") or self.states[job_id] is not S.QUEUED:
                pass_deadline(self.client, job_id)
                self.client.zadd(keys.DEADLINES, {job_id: 1})  # perhaps of a job that waits no more
        self.store.expire()

    def promote(self) -> None:
        for job_id in self.client.zrange(keys.SCHEDULED, 0, -1):
            self.client.zadd(keys.SCHEDULED, {job_id: 1})
        if self.ids:
            self.client.zadd(keys.SCHEDULED, {self.any_id(): 1})  # RQ's scheduler may leave one behind
        self.store.promote()

    def push_twice(self) -> None:
        if self.ids and self.states[job_id := self.any_id()] is not S.QUEUED:
            self.client.rpush(keys.READY, job_id)
            self.pushed.add(job_id)

    def rq_cancel(self) -> None:
        if self.ids and self.states[job_id := self.any_id()] not in FINAL:  # RQ would let one cancel what has ended
            self.by_rq.add(job_id)
            self.pushed.add(job_id)  # its id may stay in a list after RQ's cancel, and be queued once more
            self.rq_job(job_id).cancel()

    def rq_requeue(self) -> None:
        if self.ids:
            job_id = self.any_id()
            self.by_rq.add(job_id)
            self.pushed.add(job_id)  # its id may stay in a list after RQ's cancel, and be queued once more
            self.rq_job(job_id).requeue()

    def rq_clean(self) -> None:
        StartedJobRegistry("generate", connection=self.client, serializer=JSONSerializer).cleanup(time.time() + 9_999)

    def rq_job(self, job_id: str) -> RqJob:
        return RqJob.fetch(job_id, connection=self.client, serializer=JSONSerializer)

    def show(self) -> None:
        """Somebody reads an answer: from now on it is never started over, and only its like goes on."""
        if not self.ids:
            return
        job_id = self.any_id()
        events = self.store._runner.run(commands.show(job_id, -1))
        begun = self.client.hget(f"{keys.JOB}{job_id}", "engine")
        if self.states[job_id] not in FINAL and begun and any(event.type == "token" for event in events):
            self.read[job_id] = begun.decode()

    def lose_patience(self) -> None:
        for job_id in self.client.zrange(keys.WAITS, 0, -1):
            self.client.zadd(keys.WAITS, {job_id: 1})
        self.store.expire()

    def any_worker(self) -> str:
        return self.random.choice(list(WORKERS))

    def any_id(self) -> str:
        return self.random.choice(self.ids)

    def any_held(self) -> tuple[str, ClaimedJob] | None:
        every = [(name, job) for name in WORKERS for job in self.held[name].values()]
        return self.random.choice(every) if every else None


ACTS: dict[str, tuple[int, Callable[[Walk], None]]] = {
    "submit": (12, Walk.submit),
    "submit again": (1, Walk.submit_again),
    "claim": (14, Walk.claim),
    "publish": (14, Walk.publish),
    "settle": (8, Walk.settle),
    "zombie": (8, Walk.zombie),
    "release": (3, Walk.release),
    "die": (4, Walk.die),
    "fall silent": (2, Walk.fall_silent),
    "renew": (5, Walk.renew),
    "cancel": (3, Walk.cancel),
    "retry": (4, Walk.retry),
    "delete": (5, Walk.delete),
    "expire": (2, Walk.expire),
    "promote": (2, Walk.promote),
    "push twice": (2, Walk.push_twice),
    "rq cancel": (3, Walk.rq_cancel),
    "rq requeue": (4, Walk.rq_requeue),
    "rq clean": (1, Walk.rq_clean),
    "show": (3, Walk.show),
    "lose patience": (1, Walk.lose_patience),
}


def reachable(state: JobState, act: str) -> frozenset[JobState]:
    """Where one act may bring a job: some act twice; RQ requeues whatever its registry of failed jobs has."""
    direct = MOVES[state] | ({S.QUEUED} if act == "rq requeue" and state in FINAL else frozenset())
    return direct | {state} | frozenset(after for each in direct for after in MOVES[each])


def walk(store: Store, seed: int, steps: int) -> None:
    """Take so many steps, checking each."""
    world = Walk(store, seed)
    for name, card in WORKERS.items():
        born(store, name, card=card)
    trail: list[str] = []
    for number in range(steps):
        try:
            trail.append(world.step())
            world.check(trail[-1], number % 4 == 0)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {number} after {trail[-6:]}: {error}") from error


@pytest.fixture(scope="module")
def quick_url() -> Iterator[str]:
    """A real Valkey that writes nothing to its disk: a walk is about what the scripts do."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        server = start_valkey(Path(name), fsync="no")
        with redis.Redis.from_url(server.url) as client:
            client.config_set("appendonly", "no")
        yield server.url
        server.process.kill()
        server.process.wait(10)


@pytest.fixture
def store(quick_url: str) -> Iterator[Store]:
    store = Store(settings(quick_url, durability="memory"))
    store.connection.flushall()
    yield store
    store.close()


@pytest.mark.parametrize("seed", range(4))
def test_no_walk_breaks_a_promise(store: Store, seed: int) -> None:
    walk(store, seed, STEPS)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One line broken by hand."""

    script: str
    line: str
    broken: str


MUTANTS = {
    "claiming whatever it finds": Mutant("claim", "if job and job.status ~= 'queued' then", "if not job then"),
    "claiming without raising the fence": Mutant(
        "claim", "call('HINCRBY', key, 'attempt', 1)", "math.max(1, job.attempt) call('HSET', key, 'attempt', attempt)"
    ),
    "claiming an ended job with its old log": Mutant("claim", "and job.closed then reopen(id, job) end", "then end"),
    "publishing without a fence": Mutant("publish", "if not job or job.attempt ~= attempt then", "if not job then"),
    "publishing twice": Mutant("publish", "if number >= job.events then", "if true then"),
    "settling without a fence": Mutant("settle", "if not job or job.attempt ~= attempt then", "if not job then"),
    "settling what does not run": Mutant("settle", "if job.status ~= 'started' and not late then", "if false then"),
    "settling again": Mutant("settle", "if job.settled == attempt then return 2 end", ""),
    "releasing without a fence": Mutant("release", "job.attempt ~= attempt or job.status ~= 'started'", "false"),
    "a late failure counts": Mutant("settle", "and outcome == 'succeeded'", ""),
    "requeueing what was cancelled": Mutant("lib/moves", "if job.cancel_requested then return", "if false then return"),
    "ending twice": Mutant("lib/moves", "if job.closed or not is_final", "if not is_final"),
    "retrying what succeeded": Mutant("retry", "if job.state ~= 'failed' or (", "if not is_final(job.state) or ("),
    "reaping what others hold": Mutant("reap", "job.status == 'started' and job.attempt == tonumber(attempt)", "true"),
    "losing the index": Mutant("lib/base", "if state then call('ZADD'", "if state == 'queued' then call('ZADD'"),
    "indexing twice": Mutant("lib/base", "    call('ZREM', K.index .. job.kind .. ':' .. job.place, id)\n", ""),
    "leaving an execution behind": Mutant("lib/moves", "  call('ZREM', K.wip, member)\n", ""),
    "promoting what is not scheduled": Mutant("promote", "if job and job.status == 'scheduled' then", "if job then"),
    "expiring what runs": Mutant("expire", "if job and job.state == 'queued' then", "if job then"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_walk_finds_a_mutant(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mutant = MUTANTS[name]
    shutil.copytree(scripting.FOLDER, tmp_path / "scripts")
    path = tmp_path / "scripts" / f"{mutant.script}.lua"
    text = path.read_text()
    assert text.count(mutant.line) == 1, "the line to break is not there any more"
    path.write_text(text.replace(mutant.line, mutant.broken))
    monkeypatch.setattr(scripting, "FOLDER", tmp_path / "scripts")
    scripting.scripts.cache_clear()
    try:
        with pytest.raises((AssertionError, redis.ResponseError)):
            _walk_far(store, store.connection)
    finally:
        scripting.scripts.cache_clear()


def _walk_far(store: Store, client: redis.Redis) -> None:
    for seed in range(6):
        client.flushall()
        walk(store, seed, 800)
