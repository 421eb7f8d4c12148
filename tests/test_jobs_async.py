"""The API's door: grouped pipelines, streams that resume anywhere, and waiting that always ends."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from core.errors import JobNotFound, NotDurable, QueueFull, StoreUnavailable
from core.request import Request
from jobs import keys
from jobs.async_store import AsyncStore
from jobs.durable import check_on_disk
from jobs.job import JobState, NewJob
from jobs.lane import Lane
from jobs.reports import LoggedEvent
from jobs.store import Store
from tests.conftest import Server, start_valkey
from tests.jobs_world import (
    add,
    audit,
    born,
    done,
    failed,
    kill,
    numbers_of,
    say,
    settings,
    take,
    text_of,
    types,
)

S = JobState
NEW = Request(prompt="Once upon")


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url))
    born(store)
    yield store
    store.close()


def using(url: str, body: Callable[[AsyncStore], Awaitable[Any]], **changes: Any) -> Any:
    """Run ``body`` with an AsyncStore, in a loop of its own."""

    async def run() -> Any:
        store = AsyncStore(settings(url, **changes))
        try:
            async with asyncio.timeout(20):
                return await body(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def read(store: AsyncStore, job_id: str, after: int = -1) -> list[LoggedEvent]:
    """The whole stream of a job."""
    return [event async for events in store.watch(job_id, after) for event in events]


def test_many_submissions_share_a_pipeline_and_each_has_its_own_answer(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    async def body(door: AsyncStore) -> list[Any]:
        ids = [f"a{number}" for number in range(200)] + ["a0", "a1"]
        new = [door.submit(NewJob(id=job_id, request=NEW)) for job_id in ids]
        return await asyncio.gather(*new, return_exceptions=True)

    valkey.config_resetstat()
    answers = using(valkey_url, body, max_queued=150)
    waits = valkey.info("commandstats").get("cmdstat_waitaof", {})

    assert [answer.created for answer in answers[:150]] == [True] * 150
    assert all(isinstance(answer, QueueFull) for answer in answers[150:200])
    assert [(answer.created, answer.job.id) for answer in answers[200:]] == [(False, "a0"), (False, "a1")]
    assert waits["calls"] == 2  # 128 in the first pipeline, the rest in the second
    assert valkey.llen(keys.READY) == 150


def test_a_submission_is_answered_only_when_the_disk_has_it(valkey_url: str) -> None:
    async def body(door: AsyncStore) -> list[Any]:
        wait = ("WAITAOF", 1, 1, 1)
        door._submits = Lane(door._submitting, wait, functools.partial(check_on_disk, wait))
        return await asyncio.gather(
            *(door.submit(NewJob(id=f"a{number}", request=NEW)) for number in range(3)), return_exceptions=True
        )

    answers = using(valkey_url, body)  # a replica that does not exist stands for a disk that does not answer

    assert [type(answer) for answer in answers] == [NotDurable] * 3


def test_everything_a_client_does_works_through_this_door(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    async def body(door: AsyncStore) -> None:
        assert (await door.inspect()).append_only
        await door.submit(NewJob(id="a", request=NEW, deadline_seconds=60))
        assert [job.id for job in await door.list(states=[S.QUEUED])] == ["a"]
        assert (await door.queue()).queued == 1
        assert [worker.name for worker in await door.workers()] == ["w"]
        assert [card.name for card in await door.models()] == ["toy"]
        assert [card.name for card in await door.known()] == ["toy"]
        [job] = take(store)
        store.report([], [failed(job)])
        assert (await door.retry("a")).state is S.QUEUED
        assert (await door.cancel("a")).state is S.CANCELLED
        await door.delete("a")
        with pytest.raises(JobNotFound):
            await door.get("a")
        assert await door.events("a") == []

    using(valkey_url, body)
    assert audit(valkey) == []


def test_a_stream_is_the_log_frame_by_frame_while_workers_die(store: Store, valkey_url: str) -> None:
    async def body(door: AsyncStore) -> None:
        readers = [asyncio.create_task(read(door, "a")) for _ in range(3)]
        said = 0
        for attempt in range(4):
            born(store)
            [job] = take(store)
            for number in range(3):
                store.report([say(job, said, first=job.next_event + number)], [])
                said += 1
                await asyncio.sleep(0.01 * (attempt % 2))
            if attempt < 3:
                kill(store)
        readers.append(asyncio.create_task(read(door, "a", 4)))
        await asyncio.sleep(0.01)
        store.report([], [done(job)])
        *whole, tail = await asyncio.gather(*readers)
        log = store.events("a")
        assert types(log) == "stttstttstttstttf"
        assert all(stream == log for stream in whole)
        assert tail == log[5:]
        assert text_of(log) == "".join(f"w{number} " for number in range(12))

    add(store, "a")
    using(valkey_url, body)


def test_a_stream_resumes_after_any_number_also_after_the_end(store: Store, valkey_url: str) -> None:
    add(store, "a")
    [job] = take(store)
    store.report([say(job, 1, 2, 3)], [done(job)])
    log = store.events("a")

    async def body(door: AsyncStore) -> None:
        for after in range(-1, 6):
            assert await read(door, "a", after) == log[after + 1 :]

    using(valkey_url, body)
    assert numbers_of(log) == [0, 1, 2, 3, 4]


def test_readers_who_join_late_miss_nothing_and_read_nothing_twice(store: Store, valkey_url: str) -> None:
    add(store, "a")
    [job] = take(store)

    async def body(door: AsyncStore) -> None:
        readers = []
        for number in range(30):
            readers.append((number - 1, asyncio.create_task(read(door, "a", number - 1))))
            store.report([say(job, number, first=number + 1)], [])
            if number % 7 == 0:
                await asyncio.sleep(0)
            if number % 5 == 0:
                await asyncio.sleep(0.002)
        store.report([], [done(job)])
        log = store.events("a")
        for after, reader in readers:
            assert await reader == log[after + 1 :]

    using(valkey_url, body)


def test_a_reader_that_went_away_is_followed_no_more(store: Store, valkey_url: str) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> None:
        stream = door.watch("a")
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.05)
        assert len(door._watcher._followed) == 1
        first.cancel()
        await asyncio.wait({first})
        await stream.aclose()
        assert len(door._watcher._followed) == 0

    using(valkey_url, body)


def test_a_worker_hears_which_of_its_jobs_somebody_reads_along(store: Store, valkey_url: str) -> None:
    add(store, "a")
    add(store, "b")
    jobs = take(store)

    async def body(door: AsyncStore) -> None:
        assert store.report([say(job, 1) for job in jobs], []).watched == set()
        reader = asyncio.create_task(read(door, "b"))
        await asyncio.sleep(0.05)
        assert store.report([say(job, 2, first=job.next_event + 1) for job in jobs], []).watched == {"b"}
        store.cancel("b")
        asked = store.report([say(jobs[1], 3, first=jobs[1].next_event + 2)], [])
        assert not asked.watched
        assert asked.cancels == {"b"}
        store.report([], [done(job) for job in jobs])
        await reader

    using(valkey_url, body)


def test_a_claim_tells_which_jobs_somebody_reads_along_and_which_are_young(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    for job_id in ("followed", "young", "old", "awaited"):
        add(store, job_id, awaited=job_id == "awaited")
    index = f"{keys.INDEX}generate:queued"
    for job_id in ("followed", "old"):
        valkey.zincrby(index, -1_000_000, job_id)

    async def body(door: AsyncStore) -> None:
        async for _ in door.watch("followed"):
            raise AssertionError("nothing has happened")

    with pytest.raises(TimeoutError):
        using(valkey_url, lambda door: asyncio.wait_for(body(door), 0.3))
    told = {job.id: (job.watched, job.young) for job in take(store)}
    assert told == {
        "followed": (True, False), "young": (False, True), "old": (False, False), "awaited": (False, False)
    }  # fmt: skip


def test_a_running_job_that_stock_rq_queues_again_is_claimed_again(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    assert [job.attempt for job in take(store)] == [1]
    valkey.hset(f"{keys.JOB}a", "status", "queued")
    valkey.rpush(keys.READY, "a")

    assert [job.attempt for job in take(store)] == [2]


def test_a_stream_ends_when_stock_rq_ends_the_job(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> list[LoggedEvent]:
        reader = asyncio.create_task(read(door, "a"))
        await asyncio.sleep(0.05)
        RqJob.fetch("a", connection=valkey, serializer=JSONSerializer).cancel()
        return await reader

    assert types(using(valkey_url, body)) == "f"


def test_a_stream_of_a_job_that_is_deleted_says_so(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> None:
        reader = asyncio.create_task(read(door, "a"))
        await asyncio.sleep(0.05)
        valkey.delete("rq:job:a")
        with pytest.raises(JobNotFound):
            await reader
        with pytest.raises(JobNotFound):
            await read(door, "nobody")

    using(valkey_url, body)


def test_a_reader_of_a_retried_job_goes_on_with_the_new_run(store: Store, valkey_url: str) -> None:
    add(store, "a")
    [job] = take(store)
    store.report([say(job, 1)], [failed(job)])
    store.retry("a")

    async def body(door: AsyncStore) -> list[LoggedEvent]:
        reader = asyncio.create_task(read(door, "a", 1))
        await asyncio.sleep(0.05)
        [again] = take(store)
        store.report([say(again, 7)], [done(again)])
        return await reader

    assert numbers_of(using(valkey_url, body)) == [3, 4, 5]


def test_waiting_ends_with_the_job_or_with_the_time(store: Store, valkey_url: str) -> None:
    add(store, "a")
    add(store, "slow")
    first, _ = take(store)

    async def body(door: AsyncStore) -> None:
        waiting = [asyncio.create_task(door.wait("a", 10)) for _ in range(5)]
        await asyncio.sleep(0.05)
        store.report([say(first, 1)], [])
        start = asyncio.get_running_loop().time()
        store.report([], [done(first)])
        assert [job.state for job in await asyncio.gather(*waiting)] == [S.SUCCEEDED] * 5
        assert asyncio.get_running_loop().time() - start < 0.9  # told, not found by looking again
        assert (await door.wait("a", 10)).state is S.SUCCEEDED
        assert (await door.wait("slow", 0.05)).state is S.RUNNING
        with pytest.raises(JobNotFound):
            await door.wait("nobody", 1)

    using(valkey_url, body)


def test_a_log_that_is_packed_between_two_reads_of_its_stream_has_no_hole(store: Store, valkey_url: str) -> None:
    add(store, "a")
    [job] = take(store)
    store.report([say(job, 1, 2, 3)], [done(job, "w1 w2 w3 ", 1, 2, 3)])
    log = store.events("a")

    async def body(door: AsyncStore) -> list[LoggedEvent]:
        inbox: asyncio.Queue[list[LoggedEvent]] = asyncio.Queue()
        for batch in (
            list(log[1:2]),
            list(log[-1:]),
        ):  # the end's event stands alone in the stream once the rest is packed
            inbox.put_nowait(batch)
        return await door._next(inbox, "a", 0)

    assert using(valkey_url, body) == log[1:]


def test_streams_survive_a_server_that_restarts(own_valkey: Server) -> None:
    store = Store(settings(own_valkey.url))
    born(store)
    add(store, "a")
    [job] = take(store)
    servers = [own_valkey]

    async def body(door: AsyncStore) -> None:
        stream = door.watch("a")
        seen = await anext(stream)
        own_valkey.process.kill()
        own_valkey.process.wait(10)
        with pytest.raises(StoreUnavailable):
            await door.get("a")
        servers.append(start_valkey(own_valkey.folder))
        store.report([say(job, 1)], [done(job)])
        async for events in stream:
            seen += events
        assert seen == store.events("a")
        assert (await door.submit(NewJob(id="b", request=NEW))).created

    try:
        using(own_valkey.url, body)
    finally:
        servers[-1].process.kill()
        servers[-1].process.wait(10)
        store.close()


def test_one_command_s_fault_reaches_its_caller_as_it_is(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    valkey.set("rq:job:a", "not a hash")

    async def body(door: AsyncStore) -> None:
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            await door.get("a")

    using(valkey_url, body)
