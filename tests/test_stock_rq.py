"""What stock RQ 3.0.0 loses or does twice, reproduced: the reason for each of our scripts, named in the last line.

When one of these fails, RQ has mended something: look whether the script it names can become simpler.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis
import rq
from rq import Queue, Retry, SimpleWorker
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.registry import (
    CanceledJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    StartedJobRegistry,
    clean_registries,
)
from rq.serializers import JSONSerializer

from tests.proxy import Rule, cut, proxied

LATER = 400 * 86_400.0  #: seconds: whatever RQ's clean-ups wait for has happened by then


class Stock:
    """One queue or two, and a worker of stock RQ that is killed wherever a test wants."""

    def __init__(self, client: redis.Redis, *names: str) -> None:
        self.client: Any = client
        self.queues = [Queue(name, connection=client, serializer=JSONSerializer) for name in names]
        self.worker = SimpleWorker(self.queues, connection=client, serializer=JSONSerializer)
        self.worker.register_birth()

    def enqueue(self, **options: Any) -> Job:
        return self.queues[0].enqueue("operator.neg", 1, **options)

    def start(self, *, upto: str = "running") -> tuple[Job, Any]:
        """A worker takes the next job and dies: after ``dequeue``, after ``prepare``, or while it is ``running``."""
        found = Queue.dequeue_any(self.queues, None, connection=self.client, serializer=JSONSerializer)
        assert found is not None
        job = found[0]
        execution = self.worker.prepare_execution(job) if upto != "dequeue" else None
        if upto == "running":
            self.worker.prepare_job_execution(job, remove_from_intermediate_queue=len(self.queues) == 1)
        return job, execution

    def clean_up(self) -> None:
        """All the maintenance RQ has, with all the time in the world."""
        for queue in self.queues:
            clean_registries(queue)
            self.started(queue).cleanup(time.time() + LATER)
            IntermediateQueue.cleanup(IntermediateQueue(queue.key, self.client), self.worker, queue)

    def started(self, queue: Queue | None = None) -> StartedJobRegistry:
        return StartedJobRegistry(queue=queue or self.queues[0])

    def places(self, job: Job) -> list[str]:
        """Where the job's id stands."""
        found = [f"list {key.decode()}" for key in self.keys("list") for _ in range(self.count(key, job.id))]
        return found + [f"zset {key.decode()}" for key in self.keys("zset") if self.holds(key, job.id)]

    def keys(self, kind: str) -> list[bytes]:
        return list(self.client.scan_iter("rq:*", _type=kind))

    def count(self, key: bytes, job_id: str) -> int:
        return int(self.client.lrange(key, 0, -1).count(job_id.encode()))

    def holds(self, key: bytes, job_id: str) -> bool:
        if key.startswith(b"rq:executions:"):
            return False
        return any(member.split(b":")[0] == job_id.encode() for member in self.client.zrange(key, 0, -1))

    def is_lost(self, job: Job) -> bool:
        """Waiting by its status, and nowhere to be found."""
        self.clean_up()
        return job.get_status() in ("queued", "scheduled") and self.places(job) == []

    def runs(self) -> int:
        """Let another worker work until nothing is queued; how many executions that took."""
        worker = SimpleWorker(self.queues, connection=self.client, serializer=JSONSerializer)
        worker.work(burst=True)
        worker.refresh()
        return int(worker.successful_job_count + worker.failed_job_count)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """RQ's workers take over the signals of the process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.fixture
def one(valkey: redis.Redis) -> Stock:
    return Stock(valkey, "q")


@pytest.fixture
def two(valkey: redis.Redis) -> Stock:
    return Stock(valkey, "q", "other")


def test_this_is_the_rq_that_these_tests_are_about() -> None:
    assert rq.__version__ == "3.0.0"


# -- lost


def test_a_worker_of_two_queues_that_dies_after_taking_a_job_loses_it(two: Stock) -> None:
    """BLPOP has removed the id, and nobody else knows of it, retries or not.

    claim.lua
    """
    job = two.enqueue(retry=Retry(max=3))
    two.start(upto="dequeue")

    assert two.is_lost(job)


def test_a_worker_of_two_queues_that_dies_before_it_runs_the_job_loses_it(two: Stock) -> None:
    """The execution is registered, the status says queued: the clean-up skips the job, then drops the execution.

    claim.lua
    """
    job = two.enqueue(retry=Retry(max=3))
    two.start(upto="prepare")

    assert two.is_lost(job)


def test_a_job_that_never_ran_fails_when_its_worker_dies_after_taking_it(one: Stock) -> None:
    """One queue has an intermediate list; without retries the job ends there.

    claim.lua
    """
    job = one.enqueue()
    one.start(upto="dequeue")
    one.clean_up()
    first_seen = IntermediateQueue(one.queues[0].key, one.client).get_first_seen_key(job.id)
    one.client.set(first_seen, time.time() - 3600)
    one.clean_up()

    assert job.get_status() == "failed"
    assert one.runs() == 0


def test_a_worker_that_dies_while_it_schedules_a_retry_loses_the_job(one: Stock) -> None:
    """``Job.retry`` sets the status outside the transaction that would put the job anywhere.

    settle.lua
    """
    job = one.enqueue(retry=Retry(max=3, interval=60))
    one.start()
    job.refresh()
    with one.client.pipeline() as pipeline:
        job.retry(one.queues[0], pipeline)  # and is killed before it executes

    assert one.is_lost(job)


def test_a_job_with_a_time_to_live_vanishes_from_the_queue_and_nobody_is_told(one: Stock) -> None:
    """expire.lua"""
    job = one.enqueue(ttl=1)
    assert one.client.pttl(job.key) > 0
    one.client.delete(job.key)  # what Redis does a second later
    one.clean_up()

    assert one.places(job) == ["list rq:queue:q"]
    assert not Job.exists(job.id, connection=one.client)


def test_a_requeued_job_keeps_the_expiry_of_its_failure_and_vanishes(one: Stock) -> None:
    """retry.lua"""
    job = one.queues[0].enqueue("operator.truediv", 1, 0, failure_ttl=50)
    one.runs()
    FailedJobRegistry(queue=one.queues[0]).requeue(job.id)

    assert job.get_status() == "queued"
    assert 0 < one.client.ttl(job.key) <= 50


# -- twice


@pytest.fixture
def cut_once(valkey_url: str) -> Iterator[Callable[[str], tuple[Rule, redis.Redis]]]:
    """Makes a client as everybody makes it, that loses the reply to one transaction with this command inside."""
    with ExitStack() as stack:

        def make(command: str) -> tuple[Rule, redis.Redis]:
            proxy = stack.enter_context(proxied(valkey_url))
            client = stack.enter_context(redis.Redis(unix_socket_path=proxy.url.removeprefix("unix://")))
            return proxy.after("EXEC", cut, matches=lambda moment: command in moment.inside), client

        yield make


def test_an_enqueue_whose_reply_is_lost_is_queued_twice_and_runs_twice(
    one: Stock, cut_once: Callable[[str], tuple[Rule, redis.Redis]]
) -> None:
    """redis-py repeats the transaction by itself.

    submit.lua
    """
    lost, client = cut_once("RPUSH")
    job = Queue("q", connection=client, serializer=JSONSerializer).enqueue("operator.neg", 1)

    assert lost.happened.is_set()
    assert one.places(job) == ["list rq:queue:q"] * 2
    assert one.runs() == 2
    assert one.client.xlen(f"rq:results:{job.id}") == 2


def test_a_success_whose_reply_is_lost_is_written_twice(
    one: Stock, cut_once: Callable[[str], tuple[Rule, redis.Redis]]
) -> None:
    """The broken connection reads as "somebody changed the dependents", so everything is done again.

    settle.lua
    """
    lost, client = cut_once("XADD")
    job = one.enqueue()
    worker = SimpleWorker(
        [Queue("q", connection=client, serializer=JSONSerializer)], connection=client, serializer=JSONSerializer
    )
    worker.work(burst=True, max_jobs=1)

    assert lost.happened.is_set()
    assert one.client.xlen(f"rq:results:{job.id}") == 2


def test_two_clean_ups_at_once_queue_a_dead_workers_job_twice(one: Stock) -> None:
    """Nothing is watched between reading and writing; a dashboard's count is a clean-up, too.

    reap.lua
    """
    job = one.enqueue(retry=Retry(max=3))
    one.start()
    late = time.time() + LATER
    other = one.started()
    one.started().cleanup(late, exception_handlers=[lambda *_: other.cleanup(late)])

    assert one.places(job) == ["list rq:queue:q"] * 2


def test_a_monitor_whose_clock_is_fast_has_a_running_job_run_twice(one: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever counts running jobs decides, by its own clock, which of them are dead.

    claim.lua, reap.lua
    """
    job = one.enqueue(retry=Retry(max=3))
    _, execution = one.start()
    with monkeypatch.context() as skewed:
        skewed.setattr("rq.registry.current_timestamp", lambda: int(time.time()) + 300)
        assert one.started().count == 0
    assert one.places(job) == ["list rq:queue:q"]
    assert one.runs() == 1
    job.refresh()
    job._result = -1
    one.worker.handle_job_success(job, one.queues[0], one.started(), execution)  # the first worker was alive

    assert one.client.xlen(f"rq:results:{job.id}") == 2


def test_the_result_of_a_worker_that_lost_its_job_overwrites_the_status(one: Stock) -> None:
    """There is no fence: a cancelled job that was running ends a second time, in both registries.

    cancel.lua, settle.lua
    """
    job = one.enqueue()
    _, execution = one.start()
    Job.fetch(job.id, connection=one.client, serializer=JSONSerializer).cancel()
    job.refresh()
    job._result, job.ended_at = -1, job.started_at
    one.worker.handle_job_success(job, one.queues[0], one.started(), execution)

    assert job.get_status() == "finished"
    assert job.id in CanceledJobRegistry(queue=one.queues[0]).get_job_ids()
    assert job.id in FinishedJobRegistry(queue=one.queues[0]).get_job_ids()


def test_an_id_that_is_in_the_queue_twice_runs_twice(one: Stock) -> None:
    """Nobody looks at the status before running.

    claim.lua
    """
    job = one.enqueue()
    one.client.rpush("rq:queue:q", job.id)

    assert one.runs() == 2


def test_a_scheduled_job_that_was_cancelled_in_between_comes_back(one: Stock) -> None:
    """The scheduler fetches jobs, then queues what it fetched.

    promote.lua
    """
    from rq.scheduler import RQScheduler

    job = one.queues[0].enqueue_at(one.worker.birth_date, "operator.neg", 1)
    assert job.get_status() == "scheduled"
    scheduler = RQScheduler(one.queues, connection=one.client, serializer=JSONSerializer)
    scheduler.acquire_locks()
    scheduler.prepare_registries(["q"])
    fetch_many = Job.fetch_many

    def fetch_then_cancel(*args: Any, **options: Any) -> list[Job | None]:
        found: list[Job | None] = fetch_many(*args, **options)
        Job.fetch(job.id, connection=one.client, serializer=JSONSerializer).cancel()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "fetch_many", fetch_then_cancel)
        scheduler.enqueue_scheduled_jobs()
    scheduler.release_locks()

    assert job.get_status() == "queued"
    assert one.runs() == 1


def test_every_script_that_ends_or_starts_a_job_has_its_reason_here() -> None:
    tests = [value for name, value in globals().items() if name.startswith("test_") and value.__doc__]
    named = {name.rstrip(",") for test in tests for name in test.__doc__.split() if ".lua" in name}

    scripts = ("submit", "claim", "settle", "cancel", "retry", "expire", "reap", "promote")
    assert named == {f"{name}.lua" for name in scripts}
