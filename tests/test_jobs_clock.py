"""The scripts' clock: how they write a time on any day, and how long they keep what RQ's code still has to look at."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer

from jobs import commands, keys, scripting
from jobs.store import Store
from tests.jobs_world import born, done, settings, take

WIRE = {"input": {"prompt": "Once"}}
NOT_THERE = -2


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    yield store
    store.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_stamp_is_what_rq_writes_on_any_day(valkey: redis.Redis, seed: int) -> None:
    text = scripting.build("stamp", "#!lua\nreturn stamp()").text
    script = valkey.register_script(text.replace("call('TIME')", "{ARGV[2], ARGV[3]}"))
    first, pick = datetime(2000, 2, 27, tzinfo=UTC), random.Random(seed)
    for day in [*range(4), 365, *(pick.randrange(36_600) for _ in range(300))]:
        moment = first + timedelta(days=day, seconds=pick.randrange(86_400), microseconds=pick.randrange(1_000_000))
        told = script(args=[1, int(moment.timestamp()), moment.microsecond])

        assert told == moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()


@pytest.mark.parametrize("others_wait", [False, True])
@pytest.mark.parametrize("seconds", [0, 500])
def test_a_job_that_others_wait_for_is_kept_until_they_were_told(
    store: Store, valkey: redis.Redis, seconds: int, others_wait: bool
) -> None:
    queue = Queue("generate", connection=valkey, serializer=JSONSerializer)
    first = queue.enqueue("headrace.generate", WIRE, result_ttl=seconds)
    if others_wait:
        queue.enqueue("headrace.generate", WIRE, depends_on=first)
    [job] = take(store)
    store._runner.run(commands.settle(done(job)))

    asked = (60 if others_wait else NOT_THERE) if seconds == 0 else seconds
    assert asked - 1 <= valkey.ttl(f"{keys.JOB}{first.id}") <= asked
