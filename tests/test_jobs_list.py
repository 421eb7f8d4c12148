"""Lists, positions, counts and retention: what is remembered, in which order, and for how long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from core.errors import JobNotFound
from core.request import Kind, Request
from jobs import keys
from jobs.job import JobState, NewJob
from jobs.store import Store
from tests.jobs_world import OTHER, add, audit, born, done, failed, pass_deadline, settings, take

S = JobState


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    yield store
    store.close()


def test_lists_are_newest_first_page_by_page(store: Store) -> None:
    ids = [add(store).id for _ in range(7)]
    seen: list[str] = []
    while page := store.list(limit=3, after=seen[-1] if seen else None):
        seen += [job.id for job in page]

    assert seen == ids[::-1]
    with pytest.raises(JobNotFound):
        store.list(after="nobody")


def test_a_page_goes_on_behind_a_job_that_moved_meanwhile(store: Store) -> None:
    ids = [add(store).id for _ in range(6)]
    first = store.list(limit=3)
    for job in take(store):
        store.report([], [done(job)])

    assert [job.id for job in store.list(limit=9, after=first[-1].id)] == ids[2::-1]


def test_jobs_of_one_microsecond_are_listed_once_each(store: Store, valkey: redis.Redis) -> None:
    ids = [add(store).id for _ in range(9)]
    valkey.zadd(f"{keys.INDEX}generate:queued", dict.fromkeys(ids, 5))
    seen: list[str] = []
    while page := store.list(limit=2, after=seen[-1] if seen else None):
        seen += [job.id for job in page]

    assert sorted(seen) == sorted(ids)


def test_lists_take_states_and_kinds(store: Store) -> None:
    for job_id in ("a", "b", "c"):
        add(store, job_id)
    store.submit(NewJob(id="p", request=Request(kind=Kind.PREDICT, token_ids=(1,))))
    first, second = take(store, room=2)
    store.report([], [done(first), failed(second)])

    def ids(*states: JobState, kinds: tuple[Kind, ...] = ()) -> list[str]:
        return [job.id for job in store.list(states=states, kinds=kinds)]

    assert ids(S.SUCCEEDED, S.FAILED) == ["b", "a"]
    assert ids(S.QUEUED) == ["p", "c"]
    assert ids(S.QUEUED, kinds=(Kind.GENERATE,)) == ["c"]
    assert ids() == ["p", "c", "b", "a"]
    states = store.queue().states
    assert (states[S.QUEUED], states[S.RUNNING], states[S.SUCCEEDED], states[S.FAILED]) == (2, 0, 1, 1)


def test_an_index_that_stock_rq_made_wrong_is_mended_by_reading(store: Store, valkey: redis.Redis) -> None:
    for job_id in ("a", "b", "c"):
        add(store, job_id)
    valkey.hset("rq:job:a", "status", "canceled")
    valkey.delete("rq:job:b")

    assert [job.id for job in store.list(states=[S.QUEUED])] == ["c"]
    assert [job.id for job in store.list(states=[S.CANCELLED])] == ["a"]
    assert store.queue().queued == 1
    assert valkey.zscore(f"{keys.INDEX}generate:queued", "b") is None


# -- positions


def test_a_position_counts_those_ahead(store: Store) -> None:
    ids = [add(store).id for _ in range(5)]
    assert [store.get(job_id).queue_position for job_id in ids] == [1, 2, 3, 4, 5]

    take(store, room=2)
    assert [store.get(job_id).queue_position for job_id in ids] == [None, None, 1, 2, 3]


def test_a_cancelled_job_counts_as_gone_once_it_fell_out(store: Store) -> None:
    a, b, c = (add(store).id for _ in range(3))
    store.cancel(a)
    store.cancel(b)
    add(store)
    take(store, room=1)  # c: the two before it fall out

    assert store.get(c).state is S.RUNNING
    assert [job.queue_position for job in store.list(states=[S.QUEUED])] == [1]


@pytest.mark.parametrize("how", ["delete", "expire"])
def test_a_job_that_leaves_otherwise_counts_once(store: Store, valkey: redis.Redis, how: str) -> None:
    add(store, "a", deadline_seconds=60)
    last = [add(store).id for _ in range(3)][-1]
    if how == "delete":
        store.cancel("a")
        store.delete("a")
    else:
        pass_deadline(valkey, "a")
        store.expire()
    take(store, room=1)

    assert store.get(last).queue_position == 2
    take(store)
    assert [add(store).queue_position, add(store).queue_position] == [1, 2]


def test_a_released_job_is_first_and_a_retried_one_last(store: Store) -> None:
    add(store, "a")
    add(store, "b")
    one, two = take(store)
    for _ in range(3):
        add(store)
    store.release([(one.id, one.attempt)])
    store.report([], [failed(two)])
    store.retry("b")

    assert store.get("a").queue_position == 1
    assert store.get("b").queue_position == 4


def test_a_job_that_waits_for_its_model_keeps_an_estimate(store: Store) -> None:
    born(store, "o", card=OTHER)
    add(store, "a", model="other")
    take(store)
    position = store.get("a").queue_position

    assert position == 1


# -- retention


def test_ended_jobs_are_forgotten_when_their_time_is_over(store: Store, valkey: redis.Redis) -> None:
    add(store, "a", result_ttl_seconds=50)
    add(store, "b")
    for job in take(store):
        store.report([], [done(job)])
    assert 48 <= valkey.ttl("rq:job:a") <= 50
    assert valkey.ttl("headrace:events:a") <= 2
    assert 48 <= valkey.ttl("rq:results:a") <= 50
    assert store.expire() == 0

    valkey.zadd(keys.RETENTION, {"a": 1})
    assert store.expire() == 1
    with pytest.raises(JobNotFound):
        store.get("a")
    assert valkey.keys("*:a") == []
    assert valkey.zscore(keys.FINISHED, "a") is None
    assert [job.id for job in store.list()] == ["b"]
    assert audit(valkey) == []


def test_what_vanished_by_its_own_expiry_is_swept_from_the_index(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    store.report([], [done(job)])
    valkey.delete("rq:job:a", "rq:results:a", "headrace:events:a")
    valkey.zadd(keys.RETENTION, {"a": 1})
    store.expire()

    assert store.queue().states[S.SUCCEEDED] == 0
    assert valkey.zcard(keys.FINISHED) == 0


def test_a_long_backlog_of_old_jobs_is_swept_in_bounded_steps(store: Store, valkey: redis.Redis) -> None:
    valkey.zadd(keys.RETENTION, {f"x{number}": 1 for number in range(1_200)})

    assert store.expire() == 1_200


def test_the_speed_is_that_of_the_last_minute(store: Store) -> None:
    for _ in range(20):
        add(store)
    for job in take(store):
        store.report([], [done(job)])

    assert 20 / 21 <= store.queue().completions_per_second <= 2.0
