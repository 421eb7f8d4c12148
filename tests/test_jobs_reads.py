"""What the jobs room reads and notes without a script: on fakeredis, for no server is needed."""

from __future__ import annotations

from collections.abc import Iterator

import fakeredis
import pytest
import redis
from rq import Queue
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from jobs import keys
from jobs.audit import queue_lists
from jobs.dependents import release_dependents

#: Lists that are there, used or not.
EVERYBODYS = (keys.URGENT, keys.READY, keys.LOW, keys.SUSPECTS)


@pytest.fixture
def client() -> Iterator[redis.Redis]:
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    yield client
    client.close()


def test_the_lists_of_other_queues_are_not_ours(client: redis.Redis) -> None:
    other, low = f"{keys.READY}.other", f"{keys.LOW}.other"
    client.sadd(keys.QUEUES, keys.READY, other, low, "rq:queue:mail", "rq:queue:generated", "rq:queue:generate-lower")

    assert queue_lists(client) == sorted([*EVERYBODYS, other, low])


def test_a_queue_that_nobody_has_used_has_its_own_lists(client: redis.Redis) -> None:
    assert queue_lists(client) == sorted(EVERYBODYS)


def test_what_waits_for_an_ended_job_is_queued_once_and_the_note_is_gone(client: redis.Redis) -> None:
    queue = Queue("generate", connection=client, serializer=JSONSerializer)
    first = queue.enqueue("headrace.generate", {"input": {"prompt": "x"}})
    second = queue.enqueue("headrace.generate", {"input": {"prompt": "y"}}, depends_on=first)
    client.lrem(keys.READY, 0, first.id)
    first.set_status(JobStatus.FINISHED)
    client.sadd(keys.DEPENDENTS, first.id)
    release_dependents(client)
    release_dependents(client)

    assert client.lrange(keys.READY, 0, -1) == [second.id.encode()]
    assert Job.fetch(second.id, connection=client, serializer=JSONSerializer).get_status() is JobStatus.QUEUED
    assert client.scard(keys.DEPENDENTS) == 0


def test_a_job_that_is_gone_holds_nobody_up(client: redis.Redis) -> None:
    client.sadd(keys.DEPENDENTS, "gone")
    release_dependents(client)

    assert client.scard(keys.DEPENDENTS) == 0
