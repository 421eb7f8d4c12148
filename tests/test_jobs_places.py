"""Where in the queue a job stands that comes back: what the model test's walk meets too rarely."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import redis
from rq.job import Job
from rq.serializers import JSONSerializer

from core.errors import EngineError
from jobs import keys
from jobs.job import Resume
from jobs.store import Store
from tests.jobs_world import CARD, OTHER, add, born, failed, kill, say, settings, take


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    yield store
    store.close()


@pytest.mark.parametrize(("front", "order"), [(1, [b"a", b"b"]), (0, [b"b", b"a"])])
def test_a_job_that_rq_tries_again_stands_where_it_was_asked_to(
    store: Store, valkey: redis.Redis, front: int, order: list[bytes]
) -> None:
    add(store, "a")
    valkey.hset(f"{keys.JOB}a", mapping={"retries_left": 2, "enqueue_at_front_on_retry": front})
    [job] = take(store)
    add(store, "b")
    store.report([], [failed(job, EngineError("again"))])

    assert valkey.lrange(keys.READY, 0, -1) == order


def test_jobs_of_one_claim_and_one_microsecond_are_reaped_in_the_order_of_their_names(
    store: Store, valkey: redis.Redis
) -> None:
    names = [f"j{number}" for number in range(9)]
    for name in names[::-1]:
        add(store, name)
        valkey.zadd(f"{keys.INDEX}generate:queued", {name: 1})
    take(store)
    kill(store)

    assert valkey.lrange(keys.READY, 0, -1) == [name.encode() for name in names]


def test_a_job_that_waits_for_its_like_is_sent_on_by_its_like_of_another_model(
    store: Store, valkey: redis.Redis
) -> None:
    otherwise = dataclasses.replace(CARD, dtype="bfloat16")
    born(store, "u", card=otherwise)
    born(store, "o", card=OTHER)
    add(store, "a", model="toy", resume=Resume.WAIT)
    [job] = take(store)
    store.report([say(job, 1)], [])
    store.release([("a", job.attempt)])
    assert take(store, "u", card=otherwise) == []
    assert take(store, "o", card=OTHER) == []

    assert valkey.zscore(keys.WAITS, "a") is None
    assert [job.id for job in take(store)] == ["a"]
    assert take(store) == []


def test_a_job_that_waits_for_its_like_and_is_cancelled_by_rq_waits_no_more(store: Store, valkey: redis.Redis) -> None:
    otherwise = dataclasses.replace(CARD, dtype="bfloat16")
    born(store, "u", card=otherwise)
    add(store, "a", resume=Resume.WAIT)
    [job] = take(store)
    store.report([say(job, 1)], [])
    store.release([("a", job.attempt)])
    assert take(store, "u", card=otherwise) == []
    Job.fetch("a", connection=valkey, serializer=JSONSerializer).cancel()

    assert store.get("a").waiting_for is None
    assert valkey.zscore(keys.WAITS, "a") is None
