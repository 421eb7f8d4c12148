"""The fence: only the attempt that owns a job may write about it, and saying a thing twice changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis
from rq.job import Job
from rq.serializers import JSONSerializer

from core.errors import EngineError, JobConflict
from jobs import commands, keys
from jobs.job import JobState
from jobs.runner import Runner
from jobs.store import Outcome, Store
from tests.jobs_world import (
    add,
    audit,
    born,
    claim,
    done,
    ended,
    failed,
    kill,
    outlast_grace,
    result,
    say,
    settings,
    take,
    text_of,
    types,
    wipe_lease,
)

S = JobState


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url))
    born(store, "w", "v")
    yield store
    store.close()


def test_a_worker_that_lost_its_job_can_write_nothing_about_it(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [zombie] = take(store)
    kill(store)
    [successor] = take(store, worker="v")
    before = valkey.hgetall("rq:job:a")
    refusals = [
        store.report([say(zombie, 9)], []).refused,
        *(store.report([], [ended(zombie, outcome, result("stale"))]).refused for outcome in Outcome),
    ]
    store.release([(zombie.id, zombie.attempt)])

    assert refusals == [{"a"}] * 5
    assert valkey.hgetall("rq:job:a") == before
    assert (successor.attempt, store.get("a").worker) == (2, "v")
    assert store.renew("w", "busy", {"a": 1}, {}).lost == ("a",)
    assert store.report([say(successor, 1)], [done(successor)]).refused == frozenset()
    assert text_of(store.events("a")) == "w1 "
    assert audit(valkey) == []


def requeue_by_rq(store: Store, client: redis.Redis) -> None:
    Job.fetch("a", connection=client, serializer=JSONSerializer).requeue()


@pytest.mark.parametrize("again", [lambda store, _: store.retry("a"), requeue_by_rq], ids=["retry", "rq requeue"])
def test_a_worker_that_was_taken_for_dead_says_nothing_of_a_dead_letter_that_was_queued_again_since(
    again: Callable[[Store, redis.Redis], object], store: Store, valkey: redis.Redis
) -> None:
    """Its attempt is the job's last one: no claim has raised the fence yet."""
    add(store, "a")
    for _ in range(3):
        born(store)
        [zombie] = take(store)
        kill(store)
    assert store.get("a").reason == "poison_job"
    again(store, valkey)
    before = valkey.hgetall("rq:job:a")
    store.report([say(zombie, 8, 9, first=int(before[b"events"]))], [])
    store.report([], [done(zombie)])
    store.release([(zombie.id, zombie.attempt)])

    assert valkey.hgetall("rq:job:a") == before
    born(store)
    [successor] = take(store) or take(store)  # what stock RQ queued is set apart first, as a suspect
    store.report([say(successor, 1)], [done(successor)])
    assert text_of(store.events("a")) == "w1 "
    assert (store.get("a").result or {})["choices"][0]["token_ids"] == [1]
    assert audit(valkey) == []


def test_the_fence_rises_with_each_claim_and_nothing_lowers_it(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    attempts = []
    for way in ("release", "kill", "retry", "release"):
        born(store)
        [job] = take(store)
        attempts.append(job.attempt)
        if way == "release":
            store.release([(job.id, job.attempt)])
        elif way == "kill":
            kill(store)
        else:
            store.report([], [failed(job)])
            store.retry("a")

    assert attempts == [1, 2, 3, 4]
    assert store.get("a").attempt == 4
    assert take(store, worker="v")[0].attempt == 5


def test_a_late_result_counts_while_nobody_has_claimed_the_job_again(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    add(store, "b")
    late, failing = take(store)
    kill(store)
    reported = store.report([say(late, 1)], [done(late), failed(failing)])

    assert reported.refused == {"b"}
    assert store.get("a").state is S.SUCCEEDED
    assert types(store.events("a")) == "stf"
    assert valkey.llen(keys.READY) == 2  # only the hash was touched
    assert [job.id for job in take(store, worker="v")] == ["b"]
    assert audit(valkey) == []


def test_each_job_of_a_report_is_judged_by_itself(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.batch.PART", 3)
    jobs = [take(store)[0] for job_id in "abcdefg" if add(store, job_id)]
    store.release([("b", 1)])
    take(store)
    store.cancel("d")
    Runner(store.connection, 60).run(commands.follow("e", -1))
    store.report([], [done(jobs[6])])
    reported = store.report([say(job, *range(1, 2 + n)) for n, job in enumerate(jobs)], [done(jobs[5])])

    assert [*reported.refused, *reported.cancels, *reported.watched] == ["b", "d", "e"]
    assert [text_of(store.events(job_id)).count(" ") for job_id in "abcdefg"] == [1, 0, 3, 4, 5, 6, 0]
    assert [store.get(job_id).state is S.SUCCEEDED for job_id in "afg"] == [False, True, True]


def test_events_that_are_there_are_skipped_and_holes_are_our_bug(store: Store) -> None:
    add(store, "a")
    [job] = take(store)
    for publication in (say(job, 1, 2), say(job, 1, 2), say(job, 2, 3, first=2)):
        assert store.report([publication], []).refused == frozenset()

    assert text_of(store.events("a")) == "w1 w2 w3 "
    assert store.get("a").tokens_generated == 3
    with pytest.raises(redis.ResponseError, match="leaves a hole"):
        store.report([say(job, 9, first=7)], [])


def test_the_last_words_of_an_attempt_come_with_its_end_or_not_at_all(store: Store) -> None:
    add(store, "a")
    [job] = take(store)
    with pytest.raises(redis.ResponseError, match="leaves a hole"):
        store.report([say(job, 9, first=7)], [done(job)])
    assert store.get("a").state is S.RUNNING
    store.report([say(job, 1)], [])
    store.report([say(job, 1, 2)], [done(job, "w1 w2 ", 1, 2)])
    assert store.get("a").state is S.SUCCEEDED
    assert store.get("a").tokens_generated == 2
    assert text_of(store.events("a")) == "w1 w2 "
    store.report([say(job, 1, 2, 3)], [done(job)])
    assert text_of(store.events("a")) == "w1 w2 "


@pytest.mark.parametrize("outcome", Outcome)
def test_a_report_whose_reply_was_lost_is_sent_again(store: Store, valkey: redis.Redis, outcome: Outcome) -> None:
    add(store, "a")
    [job] = take(store)
    end = failed(job) if outcome is Outcome.FAILED else ended(job, outcome, result())
    store.report([say(job, 1)], [end])
    before, log = valkey.hgetall("rq:job:a"), store.events("a")

    assert store.report([say(job, 1)], [end]).refused == frozenset()
    assert (valkey.hgetall("rq:job:a"), store.events("a")) == (before, log)
    assert valkey.xlen("rq:results:a") == 1
    assert audit(valkey) == []


def test_a_repeated_settlement_does_not_end_the_retry_that_came_between(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    store.report([], [failed(job)])
    store.retry("a")
    store.report([say(job, 4)], [failed(job)])
    store.report([], [done(job)])

    assert store.get("a").state is S.QUEUED
    assert store.events("a") == []


def test_a_retry_asked_of_rq_is_not_repeated_with_the_settlement(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    valkey.hset("rq:job:a", "retries_left", 2)
    [job] = take(store)
    for _ in range(2):
        store.report([], [failed(job, EngineError("try again"))])

    assert valkey.hget("rq:job:a", "retries_left") == b"1"
    assert valkey.llen(keys.READY) == 1
    assert store.get("a").state is S.QUEUED


def test_a_release_sent_twice_leaves_one_place_in_the_queue(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    store.release([(job.id, job.attempt)])
    store.release([(job.id, job.attempt)])

    assert valkey.llen(keys.READY) == 1
    assert audit(valkey) == []


def test_a_release_after_the_job_was_claimed_again_does_nothing(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    store.release([(job.id, job.attempt)])
    take(store, worker="v")
    store.release([(job.id, job.attempt)])

    assert store.get("a").worker == "v"
    assert valkey.llen(keys.READY) == 0


def test_a_claim_whose_reply_was_lost_is_found_by_the_next_beat(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    add(store, "b")
    [known] = take(store, room=1)
    take(store, room=1)  # the reply is lost
    beat = store.renew("w", "busy", {known.id: known.attempt}, {})
    store.release(beat.unknown)

    assert beat.unknown == (("b", 1),)
    assert beat.lost == ()
    assert store.get("b").state is S.QUEUED
    assert store.renew("w", "busy", {known.id: known.attempt}, {}).unknown == ()
    assert audit(valkey) == []


def test_cancelling_twice_ends_once(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    store.cancel("a")
    with pytest.raises(JobConflict, match="has ended already: cancelled"):
        store.cancel("a")

    assert types(store.events("a")) == "f"
    assert audit(valkey) == []


@pytest.mark.parametrize("first", ["cancel", "finish"])
def test_a_job_that_is_cancelled_while_it_finishes_ends_once(store: Store, valkey: redis.Redis, first: str) -> None:
    add(store, "a")
    [job] = take(store)
    if first == "cancel":
        assert store.cancel("a").state is S.RUNNING
        store.report([], [done(job)])
    else:
        store.report([], [done(job)])
        with pytest.raises(JobConflict):
            store.cancel("a")

    assert store.get("a").state is S.SUCCEEDED
    assert audit(valkey) == []


def test_an_id_that_is_queued_twice_runs_once(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    valkey.rpush(keys.READY, "a", "a")

    assert len(take(store)) == 1
    assert take(store, worker="v") == []


def test_a_worker_that_comes_back_in_time_keeps_its_jobs(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    wipe_lease(valkey)
    first = store.reap()
    beat = store.renew("w", "busy", {"a": 1}, {})
    wipe_lease(valkey)  # marked anew: the old mark went with the renewal
    second = store.reap()

    assert (first.requeued, second.requeued, beat.lost) == (0, 0, ())
    assert store.report([], [done(job)]).refused == frozenset()


def test_a_swept_worker_claims_nothing_before_it_is_back(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    take(store)
    wipe_lease(valkey)
    store.reap()
    outlast_grace(valkey)
    report = store.reap()

    assert (report.requeued, report.workers) == (1, ("w",))
    assert claim(store).jobs == ()
    assert store.renew("w", "idle", {"a": 1}, {}).lost == ("a",)
    assert [card.name for card in store.workers()] == ["v", "w"]
    assert len(take(store)) == 1
