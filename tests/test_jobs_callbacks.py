"""Callbacks: one for each end of a job that wants it, by the script that ends it, until it is delivered or given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from core.errors import JobConflict, JobNotFound
from jobs import commands, keys
from jobs.audit import mend
from jobs.doctor import examine
from jobs.job import JobState, Webhook
from jobs.outbox import Callback, collect, note
from jobs.store import Outcome, Store
from tests.jobs_world import add, audit, born, done, ended, failed, kill, pass_deadline, settings, take

S = JobState
URL = "https://hooks.example/"


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    yield store
    store.close()


def collected(store: Store, lease_seconds: float = 60) -> list[Callback]:
    return store._runner.run(collect(lease_seconds, 100))


def noted(store: Store, callback: Callback, state: str, again_in_seconds: float = 0) -> int:
    return store._runner.run(note(callback, state, "no" if state != "delivered" else "", again_in_seconds))


def resend(store: Store, job_id: str) -> Webhook | None:
    return store._runner.run(commands.resend(job_id)).webhook


def webhook(store: Store, job_id: str = "j") -> Webhook:
    found = store.get(job_id).webhook
    assert found is not None
    return found


def finish(store: Store, job_id: str = "j", **fields: Any) -> Callback:
    """A job that has succeeded, and its callback, taken once."""
    add(store, job_id, webhook=URL, **fields)
    [job] = take(store)
    store.report([], [done(job)])
    [callback] = collected(store)
    return callback


def _succeed(store: Store) -> None:
    store.report([], [done(take(store)[0])])


def _fail(store: Store) -> None:
    store.report([], [failed(take(store)[0])])


def _stop(store: Store) -> None:
    store.report([], [ended(take(store)[0], Outcome.CANCELLED)])


def _run_late(store: Store) -> None:
    store.report([], [ended(take(store)[0], Outcome.EXPIRED)])


def _cancel_queued(store: Store) -> None:
    store.cancel("j")


def _cancel_and_release(store: Store) -> None:
    [job] = take(store)
    store.cancel("j")
    store.release([(job.id, job.attempt)])


def _wait_too_long(store: Store) -> None:
    pass_deadline(store.connection, "j")
    store.expire()


def _be_claimed_too_late(store: Store) -> None:
    pass_deadline(store.connection, "j")
    assert take(store) == []


def _kill_three(store: Store) -> None:
    for _ in range(3):
        born(store)
        take(store)
        kill(store)
    assert store.get("j").reason == "poison_job"


def _cancel_by_rq(store: Store) -> None:
    RqJob.fetch("j", connection=store.connection, serializer=JSONSerializer).cancel()
    store.get("j")


ENDS: list[tuple[Callable[[Store], None], JobState]] = [
    (_succeed, S.SUCCEEDED),
    (_fail, S.FAILED),
    (_kill_three, S.FAILED),
    (_stop, S.CANCELLED),
    (_cancel_queued, S.CANCELLED),
    (_cancel_and_release, S.CANCELLED),
    (_cancel_by_rq, S.CANCELLED),
    (_run_late, S.EXPIRED),
    (_wait_too_long, S.EXPIRED),
    (_be_claimed_too_late, S.EXPIRED),
]


@pytest.mark.parametrize(("end", "state"), ENDS, ids=[end.__name__[1:] for end, _ in ENDS])
def test_whoever_ends_a_job_leaves_one_callback_that_says_how(
    store: Store, end: Callable[[Store], None], state: JobState
) -> None:
    add(store, "j", webhook=URL, deadline_seconds=60)
    before = webhook(store)
    end(store)
    now = store.connection.time()[0]
    [callback] = collected(store)

    assert before == Webhook(url=URL)
    assert store.get("j").state is state
    assert (callback.job_id, callback.url, callback.type) == ("j", URL, f"job.{state}")
    assert (callback.attempt, callback.tries, callback.id[:4]) == (1, 1, "evt_")
    assert 0 <= now - callback.ended_at <= 2
    assert webhook(store) == Webhook(url=URL, id=callback.id, state="pending", attempts=1)
    assert audit(store.connection) == []


def test_a_job_without_a_webhook_has_no_callback(store: Store) -> None:
    add(store, "j")
    _succeed(store)

    assert collected(store) == []
    assert store.get("j").webhook is None
    assert store.connection.keys(f"{keys.CALLBACK}*") == []


def test_an_end_that_is_said_twice_leaves_one_callback(store: Store) -> None:
    add(store, "j", webhook=URL)
    [job] = take(store)
    for _ in range(3):
        store.report([], [done(job)])

    assert len(collected(store)) == 1
    assert len(store.connection.keys(f"{keys.CALLBACK}*")) == 1


def test_what_is_taken_is_nobody_else_s_until_its_lease_is_over(store: Store) -> None:
    first = finish(store)
    assert collected(store) == []
    store.connection.zadd(keys.OUTBOX, {first.id: 1})
    [second] = collected(store)

    assert (second.id, second.attempt) == (first.id, 2)
    assert noted(store, first, "failed") == 0  # it is another's attempt
    assert webhook(store).state == "pending"
    assert noted(store, first, "delivered") == 1  # whoever brings it
    assert noted(store, second, "failed") == 0
    assert webhook(store).state == "delivered"


def test_a_failed_attempt_is_tried_again_when_its_pause_is_over_and_given_up_when_told(store: Store) -> None:
    callback = finish(store)
    noted(store, callback, "pending", again_in_seconds=3600)
    assert collected(store) == []
    assert webhook(store) == Webhook(url=URL, id=callback.id, state="pending", attempts=1, last_error="no")
    score: Any = store.connection.zscore(keys.OUTBOX, callback.id)
    assert 3590 < score / 1000 - store.connection.time()[0] < 3610
    store.connection.zadd(keys.OUTBOX, {callback.id: 1})
    [again] = collected(store)
    noted(store, again, "failed")

    assert webhook(store) == Webhook(url=URL, id=callback.id, state="failed", attempts=2, last_error="no")
    assert collected(store) == []
    assert audit(store.connection) == []
    report = store.queue().callbacks
    assert (report.waiting, report.delivered, report.failed) == (0, 0, 1)


@pytest.mark.parametrize("state", ["failed", "delivered"])
def test_what_is_over_is_sent_anew_under_its_id_with_all_its_tries(store: Store, state: str) -> None:
    first = finish(store)
    noted(store, first, state)
    sent = resend(store, "j")
    assert store.connection.ttl(f"{keys.CALLBACK}{first.id}") == -1
    [second] = collected(store)
    noted(store, second, "delivered")

    assert sent is not None
    assert (sent.id, sent.state) == (first.id, "pending")
    assert (second.id, second.attempt, second.tries) == (first.id, 2, 1)
    assert webhook(store) == Webhook(url=URL, id=first.id, state="delivered", attempts=2)
    assert 0 < store.connection.ttl(f"{keys.CALLBACK}{first.id}") <= 86_460


def test_there_is_nothing_to_resend_before_the_end_or_without_a_webhook(store: Store) -> None:
    with pytest.raises(JobNotFound):
        resend(store, "nobody")
    add(store, "j", webhook=URL)
    with pytest.raises(JobConflict, match="no webhook, or no end yet"):
        resend(store, "j")
    add(store, "k")
    store.cancel("k")
    with pytest.raises(JobConflict):
        resend(store, "k")


def test_a_retried_job_is_told_of_again_under_another_id_and_the_first_end_still_is(store: Store) -> None:
    add(store, "j", webhook=URL)
    _fail(store)
    store.retry("j")
    assert webhook(store) == Webhook(url=URL)
    _succeed(store)
    first, second = sorted(collected(store), key=lambda each: each.type)

    assert (first.type, second.type) == ("job.failed", "job.succeeded")
    assert first.id != second.id == webhook(store).id
    noted(store, first, "delivered")
    assert store.connection.keys(f"{keys.CALLBACK}*") == [f"{keys.CALLBACK}{second.id}".encode()]
    assert audit(store.connection) == []


@pytest.mark.parametrize("forget", ["delete", "expire", "at once"])
def test_a_callback_outlives_its_job_until_it_is_over_and_then_leaves_nothing(store: Store, forget: str) -> None:
    callback = finish(store, result_ttl_seconds=0 if forget == "at once" else 60)
    if forget == "delete":
        store.delete("j")
    elif forget == "expire":
        store.connection.zadd(keys.RETENTION, {"j": 1})
        store.expire()
    assert not store.connection.exists(f"{keys.JOB}j")
    store.connection.zadd(keys.OUTBOX, {callback.id: 1})
    [again] = collected(store)
    assert (again.id, again.job_id, again.type) == (callback.id, "j", "job.succeeded")
    noted(store, again, "delivered")

    assert store.connection.keys(f"{keys.CALLBACK}*") == []
    assert not store.connection.exists(keys.OUTBOX)
    assert audit(store.connection) == []


@pytest.mark.parametrize("state", ["delivered", "failed"])
def test_the_record_of_what_is_over_goes_with_its_job(store: Store, state: str) -> None:
    callback = finish(store, result_ttl_seconds=100)
    assert store.connection.ttl(f"{keys.CALLBACK}{callback.id}") == -1
    noted(store, callback, state)

    assert 100 < store.connection.ttl(f"{keys.CALLBACK}{callback.id}") <= 160
    store.delete("j")
    assert store.connection.keys(f"{keys.CALLBACK}*") == []


def test_what_no_courier_came_for_in_a_week_is_given_up(store: Store) -> None:
    callback = finish(store)
    now: Any = store.connection.time()
    for days, state in ((6.9, "pending"), (7.1, "failed")):
        store.connection.zadd(keys.OUTBOX, {callback.id: (now[0] - days * 86_400) * 1000})
        store.expire()
        assert webhook(store).state == state

    assert webhook(store).last_error == "nobody came to deliver it"
    assert not store.connection.exists(keys.OUTBOX)


def test_what_is_left_of_a_callback_that_somebody_deleted_is_swept_up(store: Store) -> None:
    callback = finish(store)
    store.connection.delete(f"{keys.CALLBACK}{callback.id}")
    store.connection.zadd(keys.OUTBOX, {callback.id: 1})

    assert collected(store) == []
    assert not store.connection.exists(keys.OUTBOX)
    assert noted(store, callback, "delivered") == 0


def _lose_record(client: redis.Redis, callback: Callback) -> None:
    client.delete(f"{keys.CALLBACK}{callback.id}")
    client.zrem(keys.OUTBOX, callback.id)


def _lose_name(client: redis.Redis, callback: Callback) -> None:
    client.hdel(f"{keys.JOB}j", "callback")


def _lose_place(client: redis.Redis, callback: Callback) -> None:
    client.zrem(keys.OUTBOX, callback.id)


@pytest.mark.parametrize("hurt", [_lose_record, _lose_name, _lose_place])
def test_a_callback_that_got_lost_is_found_and_mended(
    store: Store, hurt: Callable[[redis.Redis, Callback], None]
) -> None:
    callback = finish(store)
    hurt(store.connection, callback)
    [problem] = audit(store.connection)

    assert "callback" in problem or "nobody is told" in problem
    mend(store.connection, "j")
    assert audit(store.connection) == []
    assert webhook(store).state == "pending"
    assert store.connection.zscore(keys.OUTBOX, webhook(store).id or "") is not None


def test_a_callback_that_is_over_and_waits_is_found_and_mended(store: Store) -> None:
    callback = finish(store)
    noted(store, callback, "delivered")
    store.connection.zadd(keys.OUTBOX, {callback.id: 1})
    [problem] = audit(store.connection)
    mend(store.connection, "j")

    assert "delivered, in the outbox" in problem
    assert audit(store.connection) == []
    assert webhook(store).state == "delivered"
    assert not store.connection.exists(keys.OUTBOX)


def test_a_doctor_says_that_callbacks_wait_and_nobody_takes_them(store: Store) -> None:
    callback = finish(store)
    now: Any = store.connection.time()
    notes = []
    for seconds in (30, 90):
        store.connection.zadd(keys.OUTBOX, {callback.id: (now[0] - seconds) * 1000})
        notes.append([note for note in examine(store, fix=False).notes if "callback" in note])

    assert notes[0] == []
    assert notes[1] == ["1 callbacks should have been sent by now: no courier runs, or not enough of them"]
