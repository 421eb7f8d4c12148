"""Dead letters: listed by when they died, queued again as suspects, forgotten; and nothing else is with them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from core.errors import JobNotFound
from jobs import dead_letters, keys
from jobs.async_store import AsyncStore
from jobs.audit import mend
from jobs.dead_letters import DeadLetters
from jobs.job import JobState
from jobs.store import Store
from tests.jobs_world import add, audit, born, claim, done, failed, kill, settings, take

S = JobState


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url))
    born(store)
    yield store
    store.close()


def die(store: Store, *ids: str) -> None:
    """Each is running, alone, at the deaths of three workers in a row."""
    for job_id in ids:
        add(store, job_id)
        for _ in range(3):
            born(store)
            assert [job.id for job in take(store, room=1)] == [job_id]
            kill(store)
        assert store.get(job_id).reason == "poison_job"
    born(store)


def using(url: str, body: Callable[[DeadLetters], Awaitable[Any]]) -> Any:
    """Run ``body`` with the dead letters of an AsyncStore, in a loop of its own."""

    async def run() -> Any:
        store = AsyncStore(settings(url))
        try:
            async with asyncio.timeout(20):
                return await body(store.dead)
        finally:
            await store.close()

    return asyncio.run(run())


def listed(url: str) -> list[str]:
    page = using(url, lambda dead: dead.page(limit=100))
    assert not page.more
    return [job.id for job in page.jobs]


def test_the_last_to_die_is_listed_first_and_pages_hold_each_once(store: Store, valkey_url: str) -> None:
    die(store, "b", "c", "a")
    add(store, "waits")
    add(store, "failed")
    store.report([], [failed(job) for job in take(store) if job.id == "failed"])

    async def pages(dead: DeadLetters) -> list[list[str]]:
        found, after, more = list[list[str]](), None, True
        while more:
            page = await dead.page(after, 2)
            found.append([job.id for job in page.jobs])
            after, more = page.jobs[-1].id, page.more
        with pytest.raises(JobNotFound):
            await dead.page("failed", 2)
        return found

    assert using(valkey_url, pages) == [["a", "c"], ["b"]]
    assert store.queue().dead_letters == 3


@pytest.mark.parametrize("everything", [False, True])
def test_a_dead_letter_that_is_retried_runs_alone_and_is_one_no_more(
    store: Store, valkey_url: str, valkey: redis.Redis, everything: bool
) -> None:
    die(store, "a", "b")
    moved = using(valkey_url, lambda dead: dead.retry(None if everything else ["a"]))
    assert set(moved.ids) == ({"a", "b"} if everything else {"a"})
    assert listed(valkey_url) == ([] if everything else ["b"])
    add(store, "neighbour")
    first = claim(store)

    assert (len(first.jobs), first.alone) == (1, True)
    store.report([], [done(first.jobs[0])])
    assert store.get(first.jobs[0].id).state is S.SUCCEEDED
    assert audit(valkey) == []


def test_only_dead_letters_are_retried_and_the_others_are_named(store: Store, valkey_url: str) -> None:
    die(store, "dead")
    add(store, "failed")
    store.report([], [failed(job) for job in take(store)])
    add(store, "waits")
    moved = using(valkey_url, lambda dead: dead.retry(["failed", "dead", "nobody", "waits", "dead"]))

    assert (moved.ids, moved.skipped) == (("dead",), ("failed", "nobody", "waits"))
    assert [store.get(job_id).state for job_id in ("failed", "dead", "waits")] == [S.FAILED, S.QUEUED, S.QUEUED]


def test_one_that_dies_again_is_a_dead_letter_again(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    die(store, "a", "b")
    using(valkey_url, lambda dead: dead.retry(["a"]))
    assert [job.id for job in take(store)] == ["a"]
    kill(store)

    assert listed(valkey_url) == ["a", "b"]  # by its last death
    assert audit(valkey) == []


def test_a_purge_forgets_dead_letters_and_nothing_else(store: Store, valkey_url: str, valkey: redis.Redis) -> None:
    die(store, "a", "b")
    add(store, "failed")
    add(store, "done")
    store.report([], [failed(job) if job.id == "failed" else done(job) for job in take(store)])
    moved = using(valkey_url, lambda dead: dead.purge())

    assert set(moved.ids) == {"a", "b"}
    assert listed(valkey_url) == []
    for job_id in ("a", "b"):
        with pytest.raises(JobNotFound):
            store.get(job_id)
        assert not valkey.exists(f"{keys.EVENTS}{job_id}")
    assert [store.get(job_id).state for job_id in ("failed", "done")] == [S.FAILED, S.SUCCEEDED]
    assert audit(valkey) == []


def test_a_purge_that_comes_late_forgets_no_job_that_has_become_something_else(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    die(store, "dead")
    add(store, "failed")
    add(store, "done")
    store.report([], [failed(job) if job.id == "failed" else done(job) for job in take(store)])
    late = using(valkey_url, lambda dead: dead._apply("delete", ["failed", "done", "dead"]))  # as they once were listed
    valkey.zadd(keys.DEAD, {"failed": 1, "done": 2})  # as if somebody had left them there
    purged = using(valkey_url, lambda dead: dead.purge())

    assert (late, purged.ids) == (("dead",), ())
    assert [store.get(job_id).state for job_id in ("failed", "done")] == [S.FAILED, S.SUCCEEDED]
    assert store.queue().dead_letters == 0


def test_what_stock_rq_requeues_or_deletes_is_listed_no_more_and_never_purged(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    die(store, "requeued", "deleted", "stays")
    RqJob.fetch("requeued", connection=valkey, serializer=JSONSerializer).requeue()
    RqJob.fetch("deleted", connection=valkey, serializer=JSONSerializer).delete()

    assert using(valkey_url, lambda dead: dead.retry(["requeued"])).skipped == ("requeued",)
    assert using(valkey_url, lambda dead: dead.purge()).ids == ("stays",)
    assert store.queue().dead_letters == 0
    claim(store)  # finds it in the ordinary list, and sends it to the suspects
    again = claim(store)
    assert ([job.id for job in again.jobs], again.alone) == (["requeued"], True)


def test_one_that_stock_rq_requeues_and_cancels_is_none_and_nobody_complains(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    die(store, "a")
    theirs = RqJob.fetch("a", connection=valkey, serializer=JSONSerializer)
    theirs.requeue()
    theirs.cancel()

    assert store.get("a").state is S.CANCELLED
    assert listed(valkey_url) == []
    assert audit(valkey) == []
    mend(valkey, "a")
    assert not valkey.zcard(keys.DEAD)


def test_a_job_that_is_retried_deleted_or_forgotten_alone_leaves_the_list(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    die(store, "retried", "deleted", "forgotten")
    store.retry("retried")
    store.delete("deleted")
    valkey.zadd(keys.RETENTION, {"forgotten": 1})
    store.expire()

    assert store.queue().dead_letters == 0
    assert listed(valkey_url) == []


def test_one_call_moves_a_bounded_number_and_says_that_there_are_more(
    store: Store, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "PAGE", 2)
    monkeypatch.setattr(dead_letters, "MOST_ROUNDS", 2)
    die(store, *"abcde")
    first = using(valkey_url, lambda dead: dead.retry())
    second = using(valkey_url, lambda dead: dead.purge())

    assert (len(first.ids), first.more) == (4, True)
    assert (len(second.ids), second.more) == (1, False)
    assert {*first.ids, *second.ids} == set("abcde")
