"""Priorities in the queue: the lower, the earlier; nobody waits for ever; every job has one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import redis
from rq import Queue
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from core.errors import DeadlineUnreachable, InvalidField
from core.request import Request
from jobs import keys
from jobs.audit import mend
from jobs.job import JobState
from jobs.store import Store
from tests.jobs_world import OTHER, add, audit, born, done, failed, kill, list_of, settings, take

URGENT, NORMAL, LOW = -1, 0, 1


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    yield store
    store.close()


def queue_up(store: Store, *priorities: int, count: int = 1, model: str | None = None) -> list[str]:
    return [add(store, priority=priority, model=model).id for _ in range(count) for priority in priorities]


def claimed(store: Store, room: int = 1, **worker: object) -> list[int]:
    """Priorities of what one claim brings."""
    jobs = take(store, room=room, running=1, **worker)  # type: ignore[arg-type]
    return [job.request.priority for job in jobs if isinstance(job.request, Request)]


@pytest.mark.parametrize("priority", [-100, -1])
def test_an_urgent_job_is_claimed_before_all_that_wait(store: Store, priority: int) -> None:
    queue_up(store, LOW, NORMAL, count=200)
    queue_up(store, priority)

    assert claimed(store) == [priority]
    assert claimed(store) == [NORMAL]


def test_jobs_of_one_class_keep_the_order_of_their_submission(store: Store) -> None:
    ids = queue_up(store, 5, 100, 7)

    assert [job.id for job in take(store)] == ids


@pytest.mark.parametrize("room", [1, 3, 60])
def test_of_twenty_claimed_while_all_wait_three_are_normal_and_one_is_low(store: Store, room: int) -> None:
    queue_up(store, LOW, NORMAL, URGENT, count=60)
    order = [priority for _ in range(60 // room) for priority in claimed(store, room)]

    for start in (0, 20, 40):
        assert Counter(order[start : start + 20]) == {URGENT: 16, NORMAL: 3, LOW: 1}


@pytest.mark.parametrize(("priorities", "shares"), [((URGENT, LOW), (19, 1)), ((NORMAL, LOW), (19, 1))])
def test_a_class_that_is_missing_leaves_its_share_to_the_more_urgent(
    store: Store, priorities: tuple[int, int], shares: tuple[int, int]
) -> None:
    queue_up(store, *priorities, count=40)

    assert Counter(claimed(store, 20)) == dict(zip(priorities, shares, strict=True))


def test_a_low_job_ends_while_urgent_ones_never_stop_coming(store: Store) -> None:
    [low] = queue_up(store, LOW)
    for _ in range(20):
        queue_up(store, URGENT, count=2)
        for job in take(store, room=2, running=1):
            store.report([], [done(job)])

    assert store.get(low).state is JobState.SUCCEEDED


def test_workers_of_two_models_take_turns_each_by_itself(store: Store) -> None:
    born(store, "o", card=OTHER)
    for model in ("toy", "other"):
        queue_up(store, LOW, URGENT, count=50, model=model)
    order = [(claimed(store), claimed(store, worker="o", card=OTHER)) for _ in range(20)]

    assert [Counter(priority for [priority] in each) for each in zip(*order, strict=True)] == [{URGENT: 19, LOW: 1}] * 2


def test_only_what_went_before_others_counts_as_a_turn(store: Store, valkey: redis.Redis) -> None:
    queue_up(store, NORMAL, count=30)
    claimed(store, 30)
    queue_up(store, LOW, URGENT)

    assert claimed(store, 2) == [URGENT, LOW]
    assert valkey.hgetall(keys.TURNS) == {b"toy": b"2"}


@pytest.mark.parametrize("priority", [-7, 0, 7])
def test_what_is_handed_back_is_first_of_its_class_and_what_is_retried_last(
    store: Store, valkey: redis.Redis, priority: int
) -> None:
    back, again, reaped = queue_up(store, *[priority] * 3)
    jobs = {job.id: job for job in take(store)}
    [waits] = queue_up(store, priority)
    store.report([], [failed(jobs[again])])
    store.retry(again)
    store.release([(back, jobs[back].attempt)])
    kill(store)

    assert valkey.lrange(list_of(priority), 0, -1) == [each.encode() for each in (reaped, back, waits, again)]
    assert audit(valkey) == []
    assert [store.get(job_id).priority for job_id in (back, again)] == [priority] * 2
    assert [store.get(job_id).queue_position for job_id in (reaped, back, waits, again)] == [1, 1, 1, 2]


def test_jobs_of_another_model_wait_for_it_in_their_own_class(store: Store, valkey: redis.Redis) -> None:
    born(store, "o", card=OTHER)
    low, urgent, normal = queue_up(store, LOW, URGENT, NORMAL, model="Other")

    assert take(store) == []
    assert valkey.lrange(f"{keys.LOW}.other", 0, -1) == [low.encode()]
    assert audit(valkey) == []
    assert [job.id for job in take(store, "o", card=OTHER)] == [urgent, normal, low]


def test_a_suspect_goes_before_all_whatever_its_priority(store: Store) -> None:
    [suspect] = queue_up(store, LOW)
    for _ in range(2):
        take(store)
        kill(store)
        born(store)
    queue_up(store, URGENT)

    assert [job.id for job in take(store)] == [suspect]


@pytest.mark.parametrize(("priority", "kept"), [(0, None), (-100, b"-100"), (100, b"100")])
def test_a_job_shows_its_priority_and_keeps_it_only_where_it_says_something(
    store: Store, valkey: redis.Redis, priority: int, kept: bytes | None
) -> None:
    job = add(store, "a", priority=priority)

    assert (job.priority, store.get("a").priority, store.list()[0].priority) == (priority,) * 3
    assert job.to_wire()["priority"] == priority
    assert valkey.hget(f"{keys.JOB}a", "priority") == kept


@pytest.mark.parametrize("priority", [-101, 101, 0.5, True, None, "1"])
def test_a_priority_out_of_its_bound_is_refused_with_field_and_limit(priority: object) -> None:
    with pytest.raises(InvalidField) as refused:
        Request.from_wire({"kind": "generate", "input": {"prompt": "x"}, "priority": priority})

    assert refused.value.param == "priority"
    assert "an integer" in str(refused.value) or "from -100 to 100" in str(refused.value)


def test_a_position_counts_the_more_urgent_and_not_the_less(store: Store) -> None:
    lows, normals = queue_up(store, LOW, LOW), queue_up(store, NORMAL, NORMAL)
    urgents = queue_up(store, URGENT, URGENT)
    assert [store.get(job_id).queue_position for job_id in (*urgents, *normals, *lows)] == [1, 2, 3, 4, 5, 6]

    take(store, room=3)

    assert [store.get(job_id).queue_position for job_id in (*normals, *lows)] == [None, 1, 2, 3]


def test_positions_start_afresh_in_every_class_when_nobody_waits(store: Store, valkey: redis.Redis) -> None:
    queue_up(store, LOW, NORMAL, URGENT)
    valkey.mset({f"{keys.TICKETS}{which}": 7 for which in (":urgent", "", ":low")})  # a count went wrong
    take(store)

    assert [add(store, priority=priority).queue_position for priority in (LOW, NORMAL, URGENT)] == [1, 1, 1]


def test_only_those_before_it_can_make_a_job_late(store: Store) -> None:
    queue_up(store, NORMAL, count=100)
    for job in take(store, room=50):
        store.report([], [done(job)])

    def submit(priority: int) -> None:
        add(store, priority=priority, deadline_seconds=1, refuse_if_late=True)

    with pytest.raises(DeadlineUnreachable):
        submit(NORMAL)
    with pytest.raises(DeadlineUnreachable):
        submit(LOW)
    submit(URGENT)


@pytest.mark.parametrize("priority", [URGENT, LOW])
def test_an_idle_worker_wakes_for_every_class(store: Store, priority: int) -> None:
    assert not store.wait(0.01)
    queue_up(store, priority)

    assert store.wait(0.01)


@pytest.mark.parametrize("priority", [URGENT, LOW])
def test_a_job_that_lost_its_place_is_mended_into_its_class(store: Store, valkey: redis.Redis, priority: int) -> None:
    [job_id] = queue_up(store, priority)
    valkey.lrem(list_of(priority), 0, job_id)
    assert len(audit(valkey)) == 1

    mend(valkey, job_id)

    assert valkey.lrange(list_of(priority), 0, -1) == [job_id.encode()]
    assert audit(valkey) == []


# -- stock RQ


def rq_queue(client: redis.Redis, name: str = "generate") -> Queue:
    return Queue(name, connection=client, serializer=JSONSerializer)


def test_stock_rq_sees_each_class_as_a_queue(store: Store, valkey: redis.Redis) -> None:
    [first, *_, last] = queue_up(store, LOW, NORMAL, URGENT, LOW)

    found = {queue.name: queue.count for queue in Queue.all(connection=valkey, serializer=JSONSerializer)}
    assert found == {"generate-urgent": 1, "generate": 1, "generate-low": 2}
    assert rq_queue(valkey, "generate-low").job_ids == [first, last]


def test_a_job_that_stock_rq_requeues_goes_to_its_class(store: Store, valkey: redis.Redis) -> None:
    low, urgent = queue_up(store, LOW, URGENT)
    for job in take(store):
        store.report([], [failed(job)])
        FailedJobRegistry("generate", connection=valkey, serializer=JSONSerializer).requeue(job.id)
    [normal] = queue_up(store, NORMAL)
    assert valkey.llen(keys.READY) == 3  # RQ knows one queue of ours

    assert [job.id for job in take(store, room=1)] == [normal]
    assert audit(valkey) == []
    assert [job.id for job in take(store)] == [urgent, low]


def test_a_priority_that_stock_rq_put_in_counts_once_the_job_was_claimed(store: Store, valkey: redis.Redis) -> None:
    born(store, "o", card=OTHER)
    wire = {"input": {"prompt": "x"}, "priority": 9}
    mine, others = (
        rq_queue(valkey).enqueue("headrace.generate", {**wire, **model}).id for model in ({}, {"model": "other"})
    )
    queue_up(store, NORMAL)
    [job] = take(store, room=1)

    assert (job.id, store.get(mine).priority) == (mine, 9)
    store.release([(job.id, job.attempt)])
    assert valkey.lrange(keys.LOW, 0, -1) == [mine.encode()]
    assert claimed(store, 3) == [NORMAL, 9]
    assert valkey.lrange(f"{keys.LOW}.other", 0, -1) == [others.encode()]
    assert audit(valkey) == []
