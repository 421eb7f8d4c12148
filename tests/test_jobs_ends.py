"""Who waits for a job hears of its end at once, whatever ends it, and reads nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from core.errors import JobNotFound
from jobs import ends, keys
from jobs.async_store import AsyncStore
from jobs.job import Job, JobState
from jobs.store import Outcome, Store
from tests.conftest import Server, start_valkey
from tests.jobs_world import add, born, done, ended, failed, kill, say, settings, take
from tests.test_jobs_async import using

S = JobState
AT_ONCE_SECONDS = 0.5
LOOKED_SECONDS = 2.7  #: the next look finds it, and not the end of the wait


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url))
    born(store)
    yield store
    store.close()


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody finds an end by looking."""
    monkeypatch.setattr(ends, "LOOK_SECONDS", 3_600.0)


def succeed(store: Store) -> None:
    [job] = take(store)
    store.report([], [done(job)])


def fail(store: Store) -> None:
    [job] = take(store)
    store.report([], [failed(job)])


def cancel_queued(store: Store) -> None:
    store.cancel("a")


def cancel_running(store: Store) -> None:
    [job] = take(store)
    store.cancel("a")
    store.report([], [ended(job, Outcome.CANCELLED)])


def cancel_and_hand_back(store: Store) -> None:
    [job] = take(store)
    store.cancel("a")
    store.release([(job.id, job.attempt)])


def run_out_of_time(store: Store) -> None:
    store.connection.zadd(keys.DEADLINES, {"a": 1})
    store.connection.hset(f"{keys.JOB}a", "deadline_at", 1)
    store.expire()


def run_out_of_time_running(store: Store) -> None:
    [job] = take(store)
    store.report([], [ended(job, Outcome.EXPIRED)])


def poison(store: Store) -> None:
    for _ in range(3):
        born(store)
        assert take(store)
        kill(store)


def succeed_late(store: Store) -> None:
    """The result of a worker that was taken for dead."""
    [job] = take(store)
    kill(store)
    store.report([], [done(job)])


ENDS: dict[Callable[[Store], None], JobState] = {
    succeed: S.SUCCEEDED, fail: S.FAILED, cancel_queued: S.CANCELLED, cancel_running: S.CANCELLED,
    cancel_and_hand_back: S.CANCELLED, run_out_of_time: S.EXPIRED, run_out_of_time_running: S.EXPIRED,
    poison: S.FAILED, succeed_late: S.SUCCEEDED,
}  # fmt: skip


async def hears(waiting: asyncio.Task[Job], since: float) -> Job:
    """The job, told soon after ``since``."""
    job = await waiting
    assert time.monotonic() - since < AT_ONCE_SECONDS
    return job


async def wait_for_it(door: AsyncStore, job_id: str = "a") -> asyncio.Task[Job]:
    """Somebody who has looked, and waits now."""
    waiting = asyncio.create_task(door.wait(job_id, 3))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    return waiting


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("end", ENDS)
def test_who_waits_hears_of_every_kind_of_end_at_once(store: Store, valkey_url: str, end: Callable[..., None]) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> JobState:
        waiting = await wait_for_it(door)
        start = time.monotonic()
        end(store)
        return (await hears(waiting, start)).state

    assert using(valkey_url, body) is ENDS[end]


@pytest.mark.usefixtures("blind")
def test_every_process_hears_of_an_end(store: Store, valkey_url: str) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> None:
        other = AsyncStore(settings(valkey_url))
        waiting = [await wait_for_it(each) for each in (door, other, other)]
        start = time.monotonic()
        succeed(store)
        assert [(await hears(each, start)).state for each in waiting] == [S.SUCCEEDED] * 3
        await other.close()

    using(valkey_url, body)


def test_who_waits_reads_no_token_and_writes_nothing(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)

    async def body(door: AsyncStore) -> None:
        waiting = await wait_for_it(door)
        valkey.config_resetstat()
        for number in range(20):
            store.report([say(job, number, first=job.next_event + number)], [])
            await asyncio.sleep(0.01)
        assert "cmdstat_xread" not in valkey.info("commandstats")
        assert valkey.keys(f"{keys.WATCHERS}*") == []
        store.report([], [done(job)])
        assert (await waiting).state is S.SUCCEEDED

    using(valkey_url, body)


def test_an_end_before_anybody_listens_is_not_missed(store: Store, valkey_url: str) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> None:
        with door._ends.awaiting("a") as told:
            store.cancel("a")  # nothing else has run since
            await asyncio.wait_for(told.heard.wait(), AT_ONCE_SECONDS)

    using(valkey_url, body)


def test_a_process_listens_no_longer_than_somebody_waits_in_it_or_has_lately(
    store: Store, valkey_url: str, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "LOOK_SECONDS", 0.05)
    for job_id in ("a", "b"):
        add(store, job_id)

    async def body(door: AsyncStore) -> None:
        for job_id in ("a", "b"):
            waiting = await wait_for_it(door, job_id)
            await asyncio.sleep(0.3)
            assert valkey.pubsub_numsub(keys.ENDED) == [(keys.ENDED.encode(), 1)]
            store.cancel(job_id)
            await waiting
            assert valkey.pubsub_numsub(keys.ENDED) == [(keys.ENDED.encode(), 1)]
            await asyncio.sleep(0.5)
            assert valkey.pubsub_numsub(keys.ENDED) == [(keys.ENDED.encode(), 0)]

    using(valkey_url, body)


@pytest.mark.usefixtures("blind")
def test_an_end_while_the_connection_was_cut_is_not_missed(
    store: Store, valkey_url: str, valkey: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    for job_id in ("a", "b"):
        add(store, job_id)

    async def body(door: AsyncStore) -> None:
        waiting = [await wait_for_it(door, job_id) for job_id in ("a", "b")]
        start = time.monotonic()
        valkey.client_kill_filter(_type="pubsub")
        store.cancel("a")
        assert (await hears(waiting[0], start)).state is S.CANCELLED
        start = time.monotonic()
        store.cancel("b")
        assert (await hears(waiting[1], start)).state is S.CANCELLED

    using(valkey_url, body)
    assert "listening for the ends of jobs failed, trying again" in caplog.text


@pytest.mark.usefixtures("blind")
def test_who_has_just_seen_a_job_does_not_look_again_and_misses_no_end(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    seen = {job_id: add(store, job_id) for job_id in ("a", "b")}

    async def body(door: AsyncStore) -> None:
        waiting = asyncio.create_task(door.wait("a", 3, seen=seen["a"]))
        await asyncio.sleep(0.1)
        valkey.config_resetstat()
        again = asyncio.create_task(door.wait("b", 3, seen=seen["b"]))
        await asyncio.sleep(0.1)
        assert "cmdstat_evalsha" not in valkey.info("commandstats")
        again.cancel()
        store.cancel("b")
        await asyncio.sleep(0.1)  # its end is heard before anybody waits for it
        start = time.monotonic()
        assert (await door.wait("b", 3, seen=seen["b"])).state is S.CANCELLED
        store.cancel("a")
        assert (await hears(waiting, start)).state is S.CANCELLED

    using(valkey_url, body)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("end", [end for end in ENDS if end is not cancel_queued and end is not run_out_of_time])
def test_who_has_waited_since_the_submission_is_told_the_job_with_its_end(
    store: Store, valkey_url: str, valkey: redis.Redis, end: Callable[..., None]
) -> None:
    seen = add(store, "a", awaited=True, metadata={"for": "whom"}, result_ttl_seconds=77)

    async def body(door: AsyncStore) -> Job:
        waiting = asyncio.create_task(door.wait("a", 3, seen=seen))
        await asyncio.sleep(0.1)
        end(store)
        valkey.config_resetstat()
        job = await waiting
        assert "cmdstat_evalsha" not in valkey.info("commandstats"), "it asked"
        assert not valkey.hexists(f"{keys.JOB}a", "awaited")
        return job

    assert using(valkey_url, body) == store.get("a")


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("fields", [{"metadata": {"long": "x" * 9_000}}, {"webhook": "https://example.org"}, {}])
def test_who_waits_reads_a_job_that_is_not_told_with_its_end(
    store: Store, valkey_url: str, fields: dict[str, Any]
) -> None:
    seen = add(store, "a", awaited=bool(fields), **fields)

    async def body(door: AsyncStore) -> Job:
        waiting = asyncio.create_task(door.wait("a", 3, seen=seen))
        await asyncio.sleep(0.1)
        with store.connection.pubsub(ignore_subscribe_messages=True) as listener:
            listener.subscribe(keys.ENDED)
            listener.get_message(timeout=1)
            succeed(store)
            message: Any = listener.get_message(timeout=1)
        assert message["data"] == b"1 1\nja"
        return await waiting

    assert using(valkey_url, body) == store.get("a")


@pytest.mark.usefixtures("blind")
def test_the_end_of_an_earlier_run_is_not_told_to_who_saw_a_later_one(store: Store, valkey_url: str) -> None:
    add(store, "a", awaited=True)
    fail(store)
    seen = store.retry("a")

    async def body(door: AsyncStore) -> Job:
        waiting = asyncio.create_task(door.wait("a", 3, seen=seen))  # it hears of the first end
        await asyncio.sleep(0.2)
        assert not waiting.done()
        succeed(store)
        return await waiting

    assert using(valkey_url, body).state is S.SUCCEEDED


@pytest.mark.usefixtures("blind")
def test_what_is_not_the_end_of_a_job_is_ignored(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> None:
        waiting = await wait_for_it(door)
        for message in (b"", b"\n", b"1 x\nja", b"1 1 1\njab", b"1 1\nka", b"1 1\nj\xff"):
            valkey.publish(keys.ENDED, message)
        await asyncio.sleep(0.1)
        start = time.monotonic()
        store.cancel("a")
        assert (await hears(waiting, start)).state is S.CANCELLED

    using(valkey_url, body)


def test_a_bounded_number_of_ends_is_remembered(valkey_url: str) -> None:
    async def body(door: AsyncStore) -> None:
        for number in range(2_000):
            job_id = str(number % 1_500)
            door._ends._hear(f"1 {len(job_id)}\nj{job_id}".encode())
        assert list(door._ends._lately) == [str(number % 1_500) for number in range(1_000, 2_000)]

    using(valkey_url, body)


@pytest.mark.usefixtures("blind")
def test_the_end_of_an_earlier_run_is_not_taken_for_that_of_this_one(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    add(store, "a")
    fail(store)
    store.retry("a")

    async def body(door: AsyncStore) -> None:
        waiting = await wait_for_it(door)  # it has heard of the first end, and looked again
        valkey.config_resetstat()
        await asyncio.sleep(0.1)
        assert "cmdstat_evalsha" not in valkey.info("commandstats"), "it goes on looking"
        start = time.monotonic()
        succeed(store)
        assert (await hears(waiting, start)).state is S.SUCCEEDED

    using(valkey_url, body)


@pytest.mark.usefixtures("blind")
def test_who_waits_outlasts_a_restart_of_the_server(own_valkey: Server) -> None:
    store = Store(settings(own_valkey.url))
    born(store)
    add(store, "a")
    [job] = take(store)
    servers = [own_valkey]

    async def body(door: AsyncStore) -> None:
        waiting = await wait_for_it(door)
        own_valkey.process.kill()
        own_valkey.process.wait(10)
        servers.append(start_valkey(own_valkey.folder))
        store.report([], [done(job)])
        assert (await waiting).state is S.SUCCEEDED

    try:
        using(own_valkey.url, body)
    finally:
        servers[-1].process.kill()
        servers[-1].process.wait(10)
        store.close()


def test_who_waits_for_a_job_that_is_wiped_out_is_told_so(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> None:
        waiting, start = await wait_for_it(door), time.monotonic()
        valkey.flushall()
        with pytest.raises(JobNotFound):
            await waiting
        assert time.monotonic() - start < LOOKED_SECONDS
        add(store, "b")
        again = await wait_for_it(door, "b")
        start = time.monotonic()
        store.cancel("b")
        assert (await hears(again, start)).state is S.CANCELLED

    using(valkey_url, body)


def test_who_waits_for_a_job_that_stock_rq_ends_finds_it(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> JobState:
        waiting, start = await wait_for_it(door), time.monotonic()
        RqJob.fetch("a", connection=valkey, serializer=JSONSerializer).cancel()
        job = await waiting
        assert time.monotonic() - start < LOOKED_SECONDS
        return job.state

    assert using(valkey_url, body) is S.CANCELLED


def test_one_look_at_silent_jobs_serves_all_who_wait_and_reads_none(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    add(store, "a")

    async def body(door: AsyncStore) -> None:
        waiting = [await wait_for_it(door), await wait_for_it(door)]
        valkey.config_resetstat()
        await asyncio.sleep(2.2)
        stats = valkey.info("commandstats")
        assert (stats["cmdstat_evalsha"]["calls"], stats["cmdstat_hget"]["calls"]) == (1, 1)
        assert "cmdstat_hmget" not in stats
        for each in waiting:
            each.cancel()

    using(valkey_url, body)
