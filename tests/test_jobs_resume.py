"""A begun answer and an engine that computes otherwise: who waits, who starts over, who goes on."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from core.errors import JobNotFound
from jobs import commands, keys
from jobs.async_store import AsyncStore
from jobs.job import JobState, Resume
from jobs.reports import LoggedEvent
from jobs.runner import Runner
from jobs.store import Store, Wanted
from tests.api_world import front
from tests.jobs_world import (
    CARD,
    add,
    audit,
    born,
    done,
    kill,
    numbers_of,
    pass_deadline,
    said,
    say,
    settings,
    take,
    text_of,
    types,
)

S = JobState
UNLIKE = dataclasses.replace(CARD, dtype="bfloat16")


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    """Two workers of one model that compute unlike: ``w`` and ``u``."""
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    born(store, "u", card=UNLIKE)
    yield store
    store.close()


def begin(store: Store, resume: Resume = Resume.RESTART, **fields: Any) -> None:
    """Job ``a`` has said two tokens at ``w``, which dies."""
    add(store, "a", resume=resume, **fields)
    [job] = take(store)
    store.report([say(job, 1, 2)], [])
    kill(store)
    born(store)


def read_some(url: str, events: int) -> list[LoggedEvent]:
    """What a client sees that reads the first events of job ``a``."""

    async def run() -> list[LoggedEvent]:
        store, seen = AsyncStore(settings(url)), list[LoggedEvent]()
        try:
            async for batch in store.watch("a"):
                seen += batch
                if len(seen) >= events:
                    break
        finally:
            await store.close()
        return seen

    return asyncio.run(run())


def test_an_answer_that_nobody_has_read_is_started_over_without_a_hole_in_its_numbers(
    store: Store, valkey: redis.Redis
) -> None:
    begin(store)
    [job] = take(store, "u", card=UNLIKE)
    log = store.events("a")
    store.report([say(job, 7)], [done(job, "w7 ", 7)])

    assert types(log) == "ss"  # the token events are gone, and their numbers are given again
    assert numbers_of(store.events("a")) == [0, 1, 2, 3]
    assert text_of(store.events("a")) == "w7 "
    assert (job.next_event, said(store, "a")) == (2, [7])
    assert (store.get("a").result or {})["choices"][0]["token_ids"] == [7]
    assert audit(valkey) == []


def test_an_answer_that_somebody_has_read_waits_for_the_like_of_its_engine(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    begin(store)
    seen = read_some(valkey_url, 3)
    refused = take(store, "u", card=UNLIKE)
    waiting = store.get("a")
    found = audit(valkey)
    add(store, "b")
    unlike = take(store, "u", card=UNLIKE)
    [job] = take(store)
    store.report([say(job, 3)], [done(job, "w1 w2 w3 ", 1, 2, 3)])

    assert (types(seen), refused, found) == ("stt", [], [])
    assert (waiting.state, waiting.waiting_for) == (S.QUEUED, CARD.identity)
    assert [each.id for each in unlike] == ["b"]  # it stands in nobody's way
    assert job.id == "a"
    assert text_of(store.events("a")) == "w1 w2 w3 "
    assert store.get("a").waiting_for is None
    assert audit(valkey) == []


def test_an_answer_that_somebody_reads_along_counts_as_read_when_it_is_published(
    store: Store, valkey: redis.Redis
) -> None:
    add(store, "a")
    [job] = take(store)
    Runner(valkey, 60).run(commands.follow("a", -1))
    store.report([say(job, 1, 2)], [])
    store.expire_lease("w")

    assert take(store, "u", card=UNLIKE) == []
    assert store.get("a").waiting_for == CARD.identity


def test_a_reader_who_came_too_late_sees_the_new_answer_only(store: Store, valkey_url: str) -> None:
    begin(store)
    [job] = take(store, "u", card=UNLIKE)
    store.report([say(job, 7)], [])
    seen = read_some(valkey_url, 3)

    assert types(seen) == "sst"
    assert text_of(seen) == "w7 "
    assert numbers_of(seen) == [0, 1, 2]


def test_whoever_is_told_to_wait_waits_though_nobody_has_read(store: Store, valkey: redis.Redis) -> None:
    begin(store, Resume.WAIT)

    assert take(store, "u", card=UNLIKE) == []
    assert store.get("a").resume is Resume.WAIT
    assert [job.id for job in take(store)] == ["a"]
    assert said(store, "a") == [1, 2]
    assert audit(valkey) == []


def test_any_engine_goes_on_where_the_submitter_does_not_mind(store: Store, valkey: redis.Redis) -> None:
    begin(store, Resume.ANY)
    [job] = take(store, "u", card=UNLIKE)
    store.report([say(job, 9)], [done(job, "another decoder's text", 1, 2, 9)])
    log = store.events("a")

    assert said(store, "a") == [1, 2, 9]
    assert [event.fields["engine"]["dtype"] for event in log if event.type == "started"] == ["float32", "bfloat16"]
    assert text_of(log) == "w1 w2 w9 "  # what was streamed, whatever the result's text is
    assert audit(valkey) == []


def test_an_answer_without_a_token_begins_anywhere(store: Store) -> None:
    add(store, "a", resume=Resume.WAIT)
    take(store)
    kill(store)

    assert [job.id for job in take(store, "u", card=UNLIKE)] == ["a"]


def test_patience_ends(store: Store, valkey: redis.Redis) -> None:
    begin(store, Resume.WAIT)
    take(store, "u", card=UNLIKE)
    assert store.expire() == 0
    valkey.zadd(keys.WAITS, {"a": 1})
    store.expire()
    job = store.get("a")
    store.retry("a")
    [again] = take(store, "u", card=UNLIKE)

    assert (job.state, job.reason) == (S.FAILED, "engine_changed")
    assert CARD.identity in (job.error or {})["message"]
    assert (again.id, said(store, "a")) == ("a", [])
    assert audit(valkey) == []


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_job_that_waits_for_its_like_ends_like_any_other(store: Store, valkey: redis.Redis, how: str) -> None:
    begin(store, Resume.WAIT, deadline_seconds=60)
    take(store, "u", card=UNLIKE)
    if how == "cancel":
        store.cancel("a")
    else:
        pass_deadline(valkey, "a")
        store.expire()
    found = audit(valkey)
    left = take(store)

    assert store.get("a").state is (S.CANCELLED if how == "cancel" else S.EXPIRED)
    assert (found, left) == ([], [])
    assert text_of(store.events("a")) == "w1 w2 "
    store.delete("a")
    with pytest.raises(JobNotFound):
        store.get("a")
    assert audit(valkey) == []


def test_a_job_found_twice_waits_once(store: Store, valkey: redis.Redis) -> None:
    begin(store, Resume.WAIT)
    valkey.rpush(keys.READY, "a")
    take(store, "u", card=UNLIKE)

    assert valkey.lrange(f"{keys.LIKE}{CARD.identity}", 0, -1) == [b"a"]
    assert audit(valkey) == []


def test_an_idle_worker_of_the_right_kind_is_woken_for_it(store: Store) -> None:
    begin(store, Resume.WAIT)
    born(store, "w")
    while store.wait(0.01):
        pass
    take(store, "u", card=UNLIKE)

    assert store.wait(1.0)


def test_over_http_a_job_says_who_may_go_on_and_shows_whom_it_waits_for(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    body = {"kind": "generate", "input": {"prompt": "x"}, "resume": "wait"}
    with front(valkey_url) as api:
        wrong = api.put("/v1/jobs/b", json={**body, "resume": "never"})
        asked = api.put("/v1/jobs/a", json=body)
        [job] = take(store)
        store.report([say(job, 1)], [])
        kill(store)
        take(store, "u", card=UNLIKE)
        waiting = api.get("/v1/jobs/a").json()

    assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "resume")
    assert (asked.status_code, asked.json()["resume"], asked.json()["waiting_for"]) == (202, "wait", None)
    assert (waiting["status"], waiting["waiting_for"]) == ("queued", CARD.identity)


def test_a_suspect_that_waits_for_its_like_is_not_lost(store: Store, valkey: redis.Redis) -> None:
    begin(store, Resume.WAIT)
    take(store)
    kill(store)  # the second death in a row, without a word since: it is a suspect
    born(store)
    refused = take(store, "u", card=UNLIKE)
    waiting = store.get("a").waiting_for
    found = audit(valkey)
    again = take(store, "u", card=UNLIKE)
    suspects = store.queue().suspects
    got = store.claim(Wanted("w", CARD, 4, 0))

    assert (refused, again, found, waiting, suspects) == ([], [], [], CARD.identity, 1)
    assert ([job.id for job in got.jobs], got.alone) == (["a"], True)
    assert said(store, "a") == [1, 2]
    assert audit(valkey) == []


def test_a_job_that_lost_patience_and_is_retried_waits_in_one_list(store: Store, valkey: redis.Redis) -> None:
    begin(store, Resume.WAIT)
    take(store, "u", card=UNLIKE)
    valkey.zadd(keys.WAITS, {"a": 1})
    store.expire()
    store.retry("a")

    assert valkey.llen(f"{keys.LIKE}{CARD.identity}") == 0
    assert audit(valkey) == []
