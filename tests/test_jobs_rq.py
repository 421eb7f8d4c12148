"""Our jobs are RQ jobs: what stock RQ puts in runs here, and RQ's own tools do to ours what they document."""

from __future__ import annotations

import json
import random
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from rq import Callback, Queue, Repeat, Retry
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from core.errors import EngineError, ModelNotFound, RequestError, UnsupportedRequest
from core.request import Kind, Request
from jobs import keys
from jobs.job import JobState
from jobs.rows import pack_request, read_request
from jobs.store import Outcome, Store
from tests.jobs_world import (
    OTHER,
    add,
    audit,
    born,
    claim,
    done,
    ended,
    failed,
    kill,
    pass_deadline,
    result,
    returned,
    say,
    settings,
    take,
    types,
)

S = JobState
WIRE = {"input": {"prompt": "Once upon"}, "params": {"max_tokens": 4}}


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url))
    born(store)
    yield store
    store.close()


@pytest.fixture
def queue(valkey: redis.Redis) -> Queue:
    return Queue("generate", connection=valkey, serializer=JSONSerializer)


def fetch(client: redis.Redis, job_id: str) -> Job:
    return Job.fetch(job_id, connection=client, serializer=JSONSerializer)


def registries(client: redis.Redis, job_id: str) -> dict[str, bool]:
    kinds = {"failed": FailedJobRegistry, "finished": FinishedJobRegistry, "started": StartedJobRegistry}
    return {
        name: job_id in kind("generate", connection=client, serializer=JSONSerializer).get_job_ids()
        for name, kind in kinds.items()
    }


# -- what stock RQ puts in


def test_a_job_of_stock_rq_runs_and_its_return_value_is_the_result(
    store: Store, queue: Queue, valkey: redis.Redis
) -> None:
    theirs = queue.enqueue("headrace.generate", WIRE, job_timeout=33)
    before = store.get(theirs.id)
    [job] = take(store)
    store.report([say(job, 1)], [done(job)])
    theirs.refresh()
    over = store.get(theirs.id)

    assert (before.state, before.queue_position) == (S.QUEUED, None)
    assert job.request == Request.from_wire(WIRE, kind=Kind.GENERATE)
    assert job.timeout_seconds == 33
    assert fetch(valkey, theirs.id).return_value() == returned("w1 ")
    assert theirs.get_status() == "finished"
    assert theirs.worker_name == "w"
    assert theirs.started_at <= theirs.ended_at
    assert registries(valkey, theirs.id) == {"failed": False, "finished": True, "started": False}
    assert (over.state, over.result) == (S.SUCCEEDED, result().to_wire())
    assert over.created_at == pytest.approx(theirs.created_at.timestamp(), abs=1e-5)
    assert audit(valkey) == []


def test_a_predict_job_of_stock_rq_is_indexed_as_what_it_is(store: Store, queue: Queue, valkey: redis.Redis) -> None:
    theirs = queue.enqueue("headrace.predict", {"input": {"token_ids": [1, 2]}})
    take(store)

    assert [job.id for job in store.list(kinds=[Kind.PREDICT])] == [theirs.id]
    assert audit(valkey) == []


def test_our_hash_is_what_rq_itself_would_have_written(store: Store, queue: Queue, valkey: redis.Redis) -> None:
    theirs = queue.enqueue("headrace.generate", Request(prompt="x").to_wire())
    ours = fetch(valkey, add(store).id)

    data: Any = valkey.hget(f"rq:job:{theirs.id}", "data")
    assert json.loads(zlib.decompress(pack_request(Request(prompt="x")))) == json.loads(zlib.decompress(data))
    assert (ours.func_name, ours.origin, ours.get_status()) == ("headrace.generate", "generate", "queued")
    assert ours.args[0]["input"] == {"prompt": "Once upon"}
    assert ours.created_at == ours.enqueued_at
    assert ours.timeout == -1
    assert queue.count == 2


@pytest.mark.parametrize("length", [1, 3_000, 5_000, 200_000])
def test_a_request_of_any_length_is_packed_as_small_as_rq_packs_it(length: int) -> None:
    asked = Request(prompt="".join(random.Random(length).choices("abcdefgh ", k=length)))
    packed = pack_request(asked)

    assert read_request(packed) == asked
    assert len(packed) <= 1.02 * len(zlib.compress(zlib.decompress(packed)))


@pytest.mark.parametrize(
    ("enqueue", "named"),
    [
        (lambda queue: queue.enqueue("headrace.generate", prompt="x"), "exactly one argument"),
        (lambda queue: queue.enqueue("headrace.generate", WIRE, 1), "exactly one argument"),
        (lambda queue: queue.enqueue("os.system", "true"), "must be one of headrace.generate"),
        (lambda queue: queue.enqueue("headrace.generate", {"input": {}}), "exactly one of prompt"),
        (lambda queue: queue.enqueue("headrace.generate", WIRE, on_success=Callback("os.system")), "callbacks"),
        (lambda queue: queue.enqueue("headrace.generate", WIRE, repeat=Repeat(times=2)), "repeat"),
    ],
)
def test_what_we_cannot_compute_arrives_as_an_error_to_settle(
    store: Store, queue: Queue, valkey: redis.Redis, enqueue: Callable[[Queue], Job], named: str
) -> None:
    theirs = enqueue(queue)
    [job] = take(store)
    assert isinstance(job.request, RequestError)
    store.report([], [failed(job, job.request)])
    over = store.get(theirs.id)

    assert over.error is not None
    assert named in over.error["message"]
    assert over.error["message"] in fetch(valkey, theirs.id).latest_result().exc_string
    assert audit(valkey) == []


def test_a_pickled_job_is_never_unpickled(store: Store, valkey: redis.Redis) -> None:
    Queue("generate", connection=valkey).enqueue("os.system", "touch /tmp/never")
    [job] = take(store)

    assert isinstance(job.request, UnsupportedRequest)
    assert "JSONSerializer" in str(job.request)


def test_a_stock_job_for_another_model_waits_for_it_or_fails_when_nobody_ever_had_it(
    store: Store, queue: Queue, valkey: redis.Redis
) -> None:
    born(store, "o", card=OTHER)
    known = queue.enqueue("headrace.generate", {**WIRE, "model": "other"})
    unknown = queue.enqueue("headrace.generate", {**WIRE, "model": "gpt-9"})
    [refused] = take(store)

    assert refused.id == unknown.id
    assert isinstance(refused.request, ModelNotFound)
    assert store.get(known.id).model == "other"
    assert audit(valkey) == []
    assert [job.id for job in take(store, worker="o", card=OTHER)] == [known.id]


def test_a_rate_limited_job_gives_its_place_to_the_next(store: Store, queue: Queue, valkey: redis.Redis) -> None:
    from rq.rate_limit import RateLimit

    limit = RateLimit("key", 1)
    first = queue.enqueue("headrace.generate", WIRE, rate_limit=limit)
    second = queue.enqueue("headrace.generate", WIRE, rate_limit=limit)
    [job] = take(store)
    assert job.id == first.id
    store.report([], [done(job)])

    assert [job.id for job in take(store)] == [second.id]


def test_dependents_follow_even_when_the_worker_dies_in_between(
    store: Store, queue: Queue, valkey: redis.Redis
) -> None:
    first = queue.enqueue("headrace.generate", WIRE)
    second = queue.enqueue("headrace.generate", WIRE, depends_on=first)
    third = queue.enqueue("headrace.generate", WIRE, depends_on=second)
    [job] = take(store)
    assert store.report([], [done(job)]).with_dependents == (first.id,)
    [job] = take(store)
    assert job.id == second.id
    from jobs import commands

    store._runner.run(commands.settle(done(job)))  # and dies before it can release what waits
    assert take(store) == []
    store.tend()  # any worker's next tick

    assert [job.id for job in take(store)] == [third.id]
    assert valkey.scard(keys.DEPENDENTS) == 0


# -- retries and times to live, as RQ documents them


def test_retries_asked_of_rq_are_given_and_the_request_s_own_faults_are_not(
    store: Store, queue: Queue, valkey: redis.Redis
) -> None:
    theirs = queue.enqueue("headrace.generate", WIRE, retry=Retry(max=2))
    for left in (1, 0):
        [job] = take(store)
        store.report([], [failed(job, EngineError("again"))])
        assert valkey.hget(f"rq:job:{theirs.id}", "retries_left") == str(left).encode()
        assert store.get(theirs.id).state is S.QUEUED
        assert audit(valkey) == []
    [job] = take(store)
    store.report([], [failed(job, EngineError("again"))])
    assert store.get(theirs.id).state is S.FAILED

    queue.enqueue("headrace.generate", WIRE, retry=Retry(max=2), job_id="bad")
    [job] = take(store)
    store.report([], [failed(job, RequestError("never"))])
    assert store.get("bad").state is S.FAILED


def test_retries_wait_for_their_interval_on_the_servers_clock(store: Store, queue: Queue, valkey: redis.Redis) -> None:
    theirs = queue.enqueue("headrace.generate", WIRE, retry=Retry(max=2, interval=[100, 200]))
    [job] = take(store)
    store.report([], [failed(job, EngineError("again"))])
    due = valkey.zscore(keys.SCHEDULED, theirs.id)

    assert due is not None
    assert due - valkey.time()[0] == pytest.approx(100, abs=2)
    assert (theirs.get_status(), store.get(theirs.id).state, store.get(theirs.id).worker) == (
        "scheduled",
        S.QUEUED,
        None,
    )
    assert audit(valkey) == []
    assert (store.promote(), take(store)) == (0, [])
    valkey.zadd(keys.SCHEDULED, {theirs.id: 1})
    assert store.promote() == 1
    assert store.promote() == 0
    assert [job.attempt for job in take(store)] == [2]
    assert audit(valkey) == []


def test_a_cancelled_retry_does_not_come_back(store: Store, queue: Queue, valkey: redis.Redis) -> None:
    theirs = queue.enqueue("headrace.generate", WIRE, retry=Retry(max=2, interval=100))
    [job] = take(store)
    store.report([], [failed(job, EngineError("again"))])
    store.cancel(theirs.id)

    assert valkey.zcard(keys.SCHEDULED) == 0
    assert audit(valkey) == []


def test_times_to_live_are_those_that_were_asked_for(store: Store, queue: Queue, valkey: redis.Redis) -> None:
    lives = {"short": {"result_ttl": 7}, "kept": {"result_ttl": -1}, "gone": {"result_ttl": 0}, "silent": {}}
    for job_id, life in lives.items():
        queue.enqueue("headrace.generate", WIRE, job_id=job_id, **life)
    for job in take(store):
        store.report([], [done(job)])

    assert valkey.ttl("rq:job:short") in (6, 7)
    assert (valkey.ttl("rq:job:kept"), valkey.ttl("rq:results:kept")) == (-1, -1)
    assert valkey.zscore(keys.FINISHED, "kept") == float("inf")
    with pytest.raises(NoSuchJobError):
        fetch(valkey, "gone")
    assert valkey.ttl("rq:job:silent") > 86_000
    assert audit(valkey) == []


def test_failures_live_as_long_as_asked_for(store: Store, queue: Queue, valkey: redis.Redis) -> None:
    queue.enqueue("headrace.generate", WIRE, job_id="a", failure_ttl=9)
    [job] = take(store)
    store.report([], [failed(job)])

    assert valkey.ttl("rq:job:a") in (8, 9)


# -- what RQ's tools do to a job


def test_rqs_cancel_ends_a_queued_job(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    fetch(valkey, "a").cancel()
    over = store.get("a")

    assert over.state is S.CANCELLED
    assert over.finished_at is not None
    assert take(store) == []
    assert types(store.events("a")) == "f"
    assert store.queue().queued == 0
    assert audit(valkey) == []


@pytest.mark.parametrize(("seconds", "kept"), [(60, 60), (-1, None)])
def test_a_job_that_rq_cancels_is_kept_as_long_as_was_asked_for(
    store: Store, queue: Queue, valkey: redis.Redis, seconds: int, kept: int | None
) -> None:
    queue.enqueue("headrace.generate", WIRE, job_id="a", failure_ttl=seconds)
    take(store)
    fetch(valkey, "a").cancel()
    store.renew("w", "busy", {"a": 1}, {})
    over = store.get("a")

    assert over.finished_at is not None
    assert over.expires_at == (None if kept is None else pytest.approx(over.finished_at + kept, abs=1))
    assert valkey.ttl("rq:job:a") in ((-1,) if kept is None else (kept - 1, kept))


def test_rqs_cancel_ends_a_running_job_and_its_worker_hears_of_it(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    fetch(valkey, "a").cancel()
    beat = store.renew("w", "busy", {"a": 1}, {})

    assert beat.lost == ("a",)
    assert store.report([say(job, 1)], [done(job)]).refused == {"a"}
    assert store.get("a").state is S.CANCELLED
    assert types(store.events("a")) == "sf"
    assert valkey.exists("headrace:held:w", "rq:executions:a", "rq:execution:a:1") == 0
    assert audit(valkey) == []


def test_a_job_stopped_by_rqs_command_is_where_rq_says_it_is(store: Store, valkey: redis.Redis) -> None:
    from rq.command import send_stop_job_command

    add(store, "a")
    with pytest.raises(InvalidJobOperation):
        send_stop_job_command(valkey, "a", serializer=JSONSerializer)
    [job] = take(store)
    with valkey.pubsub() as channel:
        channel.subscribe("rq:pubsub:w")
        channel.get_message(timeout=1)
        send_stop_job_command(valkey, "a", serializer=JSONSerializer)
        message: Any = channel.get_message(timeout=1)
    store.report([say(job, 1)], [ended(job, Outcome.CANCELLED, result("w1 "))])

    assert json.loads(message["data"]) == {"command": "stop-job", "job_id": "a"}
    assert fetch(valkey, "a").get_status() == "stopped"
    assert registries(valkey, "a") == {"failed": True, "finished": False, "started": False}
    assert (store.get("a").state, store.get("a").result) == (S.CANCELLED, result("w1 ").to_wire())
    assert audit(valkey) == []


def test_rqs_requeue_of_a_failed_job_starts_it_anew(store: Store, valkey: redis.Redis) -> None:
    add(store, "a", result_ttl_seconds=5)
    [job] = take(store)
    store.report([say(job, 1)], [failed(job)])
    fetch(valkey, "a").requeue()
    queued = store.get("a")
    assert valkey.ttl("rq:job:a") == -1  # RQ had left the old expiry on

    [again] = take(store)
    running = store.get("a")
    store.report([say(again, 2)], [done(again, "w2 ")])
    over = store.get("a")

    assert (queued.state, queued.error, queued.finished_at) == (S.QUEUED, None, None)
    assert (running.error, running.tokens_generated, again.next_event) == (None, 0, 4)
    assert (over.state, over.error, over.attempt) == (S.SUCCEEDED, None, 2)
    assert fetch(valkey, "a").return_value() == returned("w2 ")
    assert over.result == result("w2 ", 2).to_wire()
    assert types(store.events("a")) == "stf"
    assert audit(valkey) == []


def test_a_requeued_job_outlives_its_old_retention(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    store.report([], [failed(job)])
    fetch(valkey, "a").requeue()
    valkey.zadd(keys.RETENTION, {"a": 1})
    store.expire()

    assert valkey.ttl("rq:job:a") == -1
    assert [job.attempt for job in take(store)] == [2]


def test_a_requeued_job_that_had_expired_gets_its_whole_time_again(store: Store, valkey: redis.Redis) -> None:
    for job_id in ("a", "b"):
        add(store, job_id, deadline_seconds=60)
        pass_deadline(valkey, job_id)
    store.expire()
    for job_id in ("a", "b"):
        fetch(valkey, job_id).requeue()
    store.cancel("b")
    [job] = take(store)

    assert job.id == "a"
    assert job.deadline_in_seconds == pytest.approx(60, abs=1)
    assert types(store.events("b")) == "f"
    assert audit(valkey) == []


def test_rqs_delete_leaves_nothing_that_a_list_would_show(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    add(store, "b")
    fetch(valkey, "a").delete()

    assert [job.id for job in store.list()] == ["b"]
    assert store.queue().queued == 1
    assert [job.id for job in take(store)] == ["b"]


def test_emptying_the_queue_with_rq_empties_it(store: Store, queue: Queue, valkey: redis.Redis) -> None:
    for _ in range(5):
        add(store)
    queue.empty()

    assert store.list() == []
    assert take(store) == []
    assert store.queue().queued == 0


def test_rqs_cleaners_on_a_clock_hours_fast_leave_live_jobs_alone(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    registry = StartedJobRegistry("generate", connection=valkey, serializer=JSONSerializer)
    registry.cleanup(timestamp=time.time() + 10 * 3600)

    assert registry.get_job_and_execution_ids() == [("a", "1")]
    assert store.report([], [done(job)]).refused == frozenset()
    assert audit(valkey) == []


def test_rq_sees_what_a_worker_executes(store: Store, valkey: redis.Redis) -> None:
    from rq.executions import Execution

    add(store, "a")
    take(store)
    execution = Execution.fetch("1", "a", connection=valkey)

    assert execution.worker_name == "w"
    assert [each.id for each in fetch(valkey, "a").get_executions()] == ["1"]
    kill(store)
    assert fetch(valkey, "a").get_executions() == []
    assert claim(store).jobs == ()


def test_a_dead_letter_reads_in_rqs_words(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    for _ in range(3):
        born(store)
        take(store)
        kill(store)

    assert "PoisonJob" in fetch(valkey, "a").latest_result().exc_string
    assert registries(valkey, "a")["failed"]
