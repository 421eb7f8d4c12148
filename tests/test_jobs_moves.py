"""What each script promises, and that no move happens which the table does not list."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from core.errors import JobConflict, JobNotFound, QueueFull
from core.request import Emitted, Kind, Request, TokenLogprob
from jobs import commands, keys
from jobs.job import FINAL, MOVES, JobState, NewJob, Resume
from jobs.store import ClaimedJob, Outcome, Publication, Settlement, Store, Wanted
from tests.jobs_world import (
    OTHER,
    add,
    audit,
    born,
    done,
    ended,
    failed,
    kill,
    outlast_grace,
    pass_deadline,
    result,
    said,
    say,
    settings,
    take,
    text_of,
    token,
    types,
    wipe_lease,
)

S = JobState


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url))
    born(store)
    yield store
    store.close()


def test_a_job_goes_from_submission_to_its_result(store: Store, valkey: redis.Redis) -> None:
    submitted = add(store, "a", metadata={"who": "mé"}, result_ttl_seconds=60)
    [job] = take(store)
    running = store.get("a")
    store.report([say(job, 1, 2)], [])
    store.report([say(job, 3, first=3)], [done(job, "w1 w2 w3 ")])
    over = store.get("a")

    assert (submitted.state, submitted.queue_position, submitted.attempt) == (S.QUEUED, 1, 0)
    assert (running.state, running.attempt, running.worker, running.queue_position) == (S.RUNNING, 1, "w", None)
    assert (over.state, over.tokens_generated, over.metadata) == (S.SUCCEEDED, 3, {"who": "mé"})
    assert over.result == result("w1 w2 w3 ", 1, 2, 3).to_wire()
    assert over.expires_at is not None
    assert over.finished_at is not None
    assert over.expires_at - over.finished_at == pytest.approx(60, abs=0.01)
    assert over.created_at <= running.started_at <= over.first_token_at <= over.finished_at  # type: ignore[operator]
    assert types(store.events("a")) == "stttf"
    assert text_of(store.events("a")) == "w1 w2 w3 "
    assert audit(valkey) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"deadline_seconds": 7.5, "resume": Resume.ANY, "metadata": {"who": "mé"}, "result_ttl_seconds": 60},
        {"webhook": "https://example.org/told", "awaited": True, "deadline_seconds": 3_600.0},
    ],
)
@pytest.mark.parametrize("asked", [{}, {"model": "toy", "priority": -3}, {"priority": 5}])
def test_a_submission_is_answered_with_the_job_as_a_poll_reads_it(
    store: Store, changes: dict[str, Any], asked: dict[str, Any]
) -> None:
    for number, priority in enumerate((-1, -1, 0, 1)):
        store.submit(NewJob(id=f"before{number}", request=Request(prompt="x", priority=priority)))
    take(store, room=1)
    request = Request(prompt="one", **asked)
    submitted = store.submit(NewJob(id="a", request=request, **changes))

    assert submitted.created
    assert submitted.job.request == request
    assert dataclasses.replace(submitted.job, request=None) == store.get("a")


def test_one_id_makes_one_job(store: Store, valkey: redis.Redis) -> None:
    first = store.submit(NewJob(id="a", request=Request(prompt="one")))
    second = store.submit(NewJob(id="a", request=Request(prompt="two")))

    assert (first.created, second.created) == (True, False)
    assert second.job.request == Request(prompt="one")
    assert valkey.llen(keys.READY) == 1
    assert len(take(store)) == 1


def test_a_full_queue_refuses_and_tells_when_to_come_back(valkey_url: str) -> None:
    store = Store(settings(valkey_url, max_queued=2))
    born(store)
    add(store, "a")
    add(store, "b")
    with pytest.raises(QueueFull) as idle:
        add(store, "c")
    for job in take(store):
        store.report([], [done(job)])
    add(store, "d")
    add(store, "e")
    with pytest.raises(QueueFull) as busy:
        add(store, "f")

    assert (idle.value.queued, idle.value.limit, idle.value.retry_after_seconds) == (2, 2, 120)
    assert 1 <= busy.value.retry_after_seconds <= 10  # two jobs ended in the last ten seconds
    assert add(store, "d").id == "d"  # a repeat is no new job
    store.close()


def test_claims_come_in_the_order_of_submission_and_never_more_than_there_is_room(store: Store) -> None:
    ids = [add(store).id for _ in range(5)]

    assert [job.id for job in take(store, room=2)] == ids[:2]
    assert [job.id for job in take(store, room=9)] == ids[2:]
    assert take(store) == []
    assert take(store, room=0) == []


def test_nothing_is_claimed_while_suspended_or_without_a_lease(store: Store, valkey: redis.Redis) -> None:
    add(store)
    valkey.set("rq:suspended", 1)
    assert take(store) == []
    assert store.renew("w", "idle", {}, {}).suspended

    valkey.delete("rq:suspended")
    assert take(store, worker="nobody") == []
    assert len(take(store)) == 1


def test_released_jobs_go_on_at_the_front_in_their_order_with_their_tokens(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    add(store, "b")
    first, second = take(store)
    add(store, "c")
    store.report([say(first, 1)], [])
    store.release([(first.id, first.attempt), (second.id, second.attempt)])
    queued = store.get("a")
    again = take(store, worker="w")

    assert (queued.state, queued.tokens_generated, queued.queue_position, queued.worker) == (S.QUEUED, 1, 1, None)
    assert [job.id for job in again] == ["a", "b", "c"]
    assert [job.attempt for job in again] == [2, 2, 1]
    assert [job.crashes for job in again] == [0, 0, 0]
    assert said(store, "a") == [1]
    assert again[0].next_event == 3
    assert audit(valkey) == []


def test_what_was_published_is_read_back_choice_by_choice(store: Store) -> None:
    add(store, "a")
    [job] = take(store)
    said = [(2, 5), (0, 1), (2, 6), (0, 2), (2, 7)]
    logprobs = {token_id: TokenLogprob(token_id=token_id, logprob=-0.5) for _, token_id in said}
    events = [token("a", token_id, index=index, logprobs=(logprobs[token_id],)) for index, token_id in said]
    store.report([Publication(job_id="a", attempt=job.attempt, first=job.next_event, events=events)], [])

    assert store.emitted("a") == (
        Emitted(token_ids=(1, 2), logprobs=(logprobs[1], logprobs[2])),
        Emitted(),
        Emitted(token_ids=(5, 6, 7), logprobs=(logprobs[5], logprobs[6], logprobs[7])),
    )
    assert store.get("a").tokens_generated == 5
    assert store.emitted("unknown") == ()


def test_cancelling_a_queued_job_ends_it_and_its_id_falls_out_at_a_claim(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    add(store, "b")

    assert store.cancel("a").state is S.CANCELLED
    assert valkey.llen(keys.READY) == 2
    assert [job.id for job in take(store)] == ["b"]
    assert valkey.llen(keys.READY) == 0
    assert types(store.events("a")) == "f"
    assert audit(valkey) == []


def test_cancelling_a_running_job_tells_its_worker_twice_and_keeps_what_it_has(
    store: Store, valkey: redis.Redis
) -> None:
    add(store, "a")
    [job] = take(store)
    with valkey.pubsub() as channel:
        channel.subscribe("rq:pubsub:w")
        channel.get_message(timeout=1)
        asked = store.cancel("a")
        message = channel.get_message(timeout=1)
    beat = store.renew("w", "busy", {"a": 1}, {})
    reported = store.report([say(job, 1)], [])
    store.report([], [ended(job, Outcome.CANCELLED, result("w1 "))])
    over = store.get("a")

    assert (asked.state, asked.cancel_requested) == (S.RUNNING, True)
    assert message is not None
    assert b'"stop-job"' in message["data"]
    assert beat.cancels == ("a",)
    assert reported.cancels == {"a"}
    assert (over.state, over.result) == (S.CANCELLED, result("w1 ").to_wire())
    assert valkey.zscore(keys.CANCELED, "a") is not None
    assert audit(valkey) == []


@pytest.mark.parametrize("through", ["release", "death"])
def test_a_cancelled_job_never_goes_back_into_the_queue(store: Store, valkey: redis.Redis, through: str) -> None:
    add(store, "a")
    [job] = take(store)
    store.cancel("a")
    if through == "release":
        store.release([(job.id, job.attempt)])
    else:
        kill(store)

    assert store.get("a").state is S.CANCELLED
    assert audit(valkey) == []


def test_a_deadline_ends_a_queued_job(store: Store, valkey: redis.Redis) -> None:
    add(store, "a", deadline_seconds=60)
    add(store, "b", deadline_seconds=60)
    add(store, "c", deadline_seconds=60)
    pass_deadline(valkey, "a")
    valkey.hset("rq:job:b", "deadline_at", 1)

    assert store.expire() == 1
    [claimed] = take(store)  # finds b on its way
    a, b = store.get("a"), store.get("b")
    assert (a.state, a.reason, a.error, b.state) == (S.EXPIRED, "deadline", None, S.EXPIRED)
    assert claimed.id == "c"
    assert claimed.deadline_in_seconds == pytest.approx(60, abs=1)
    assert types(store.events("a")) == "f"
    assert valkey.zscore(keys.FAILED, "a") is not None
    assert valkey.zcard(keys.DEADLINES) == 0
    assert audit(valkey) == []


def test_a_deadline_keeps_the_partial_text_of_a_running_job(store: Store) -> None:
    add(store, "a", deadline_seconds=60)
    [job] = take(store)
    store.report([say(job, 1)], [ended(job, Outcome.EXPIRED, result("w1 "))])
    over = store.get("a")

    assert (over.state, over.reason, over.result) == (S.EXPIRED, "deadline", result("w1 ").to_wire())


def test_a_released_job_keeps_its_deadline(store: Store, valkey: redis.Redis) -> None:
    add(store, "a", deadline_seconds=60)
    [job] = take(store)
    assert valkey.zcard(keys.DEADLINES) == 0

    store.release([(job.id, job.attempt)])
    pass_deadline(valkey, "a")
    store.expire()
    assert store.get("a").state is S.EXPIRED


def test_a_retried_job_starts_from_its_beginning_and_its_numbers_go_on(store: Store, valkey: redis.Redis) -> None:
    add(store, "a", deadline_seconds=60)
    [job] = take(store)
    store.report([say(job, 1)], [failed(job)])
    before = store.get("a")
    retried = store.retry("a")
    [again] = take(store)
    store.report([say(again, 7)], [done(again, "w7 ")])
    over = store.get("a")

    assert before.state is S.FAILED
    assert before.error == {"code": "invalid_request", "message": "no", "param": None}
    assert (retried.state, retried.error, retried.reason, retried.tokens_generated) == (S.QUEUED, None, None, 0)
    assert (retried.finished_at, retried.expires_at, retried.queue_position) == (None, None, 1)
    assert (again.attempt, again.next_event) == (2, 4)
    assert again.deadline_in_seconds == pytest.approx(60, abs=1)
    assert [event.number for event in store.events("a")] == [3, 4, 5]
    assert (over.state, over.result) == (S.SUCCEEDED, result("w7 ", 7).to_wire())
    assert valkey.zscore(keys.FAILED, "a") is None
    assert audit(valkey) == []


def test_deleting_forgets_everything(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    with pytest.raises(JobConflict, match="is queued; cancel it first"):
        store.delete("a")
    store.cancel("a")
    store.delete("a")

    with pytest.raises(JobNotFound):
        store.get("a")
    assert store.events("a") == []
    assert [key for key in valkey.keys("*") if b":a" in key] == []
    assert take(store) == []
    assert store.queue().states[S.CANCELLED] == 0


@pytest.mark.parametrize("call", [Store.get, Store.cancel, Store.retry, Store.delete])
def test_an_unknown_job_is_not_found(store: Store, call: Callable[[Store, str], object]) -> None:
    with pytest.raises(JobNotFound):
        call(store, "nobody")


def test_jobs_wait_for_a_worker_with_their_model(store: Store, valkey: redis.Redis) -> None:
    born(store, "o", card=OTHER)
    add(store, "a", model="other")
    add(store, "b", model="Toy")
    add(store, "c")

    assert [job.id for job in take(store)] == ["b", "c"]
    assert valkey.lrange(f"{keys.READY}.other", 0, -1) == [b"a"]
    assert audit(valkey) == []
    [job] = take(store, worker="o", card=OTHER)
    store.release([(job.id, job.attempt)])
    assert valkey.lrange(f"{keys.READY}.other", 0, -1) == [b"a"]
    assert take(store) == []
    assert [job.id for job in take(store, worker="o", card=OTHER)] == ["a"]


def test_the_work_of_one_claim_is_bounded(valkey_url: str) -> None:
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    for _ in range(600):
        store.cancel(add(store).id)
    add(store, "last")
    first = store.claim(Wanted("w", OTHER, 10, 0))

    assert (first.jobs, first.more) == ((), True)
    assert [job.id for job in take(store)] == ["last"]
    store.close()


@pytest.mark.parametrize("many", [1, 7])
def test_a_tick_does_all_there_is_to_do_for_others_however_much_that_is(
    store: Store, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    monkeypatch.setattr(commands, "SWEEP", 2)
    for number in range(many):
        add(store, f"dead-{number}")
    assert len(take(store, room=many)) == many
    for number in range(many):
        add(store, f"late-{number}", deadline_seconds=60)
        pass_deadline(valkey, f"late-{number}")
        add(store, f"due-{number}")
        valkey.lrem(keys.READY, 0, f"due-{number}")
        valkey.hset(f"{keys.JOB}due-{number}", "status", "scheduled")
        valkey.zadd(keys.SCHEDULED, {f"due-{number}": 1})
    wipe_lease(valkey)
    store.tend()
    outlast_grace(valkey)
    store.tend()

    assert {store.get(f"late-{number}").state for number in range(many)} == {S.EXPIRED}
    listed: Any = valkey.lrange(keys.READY, 0, -1)
    assert {*listed} >= {f"{what}-{number}".encode() for what in ("dead", "due") for number in range(many)}


# -- the table


def _expire(store: Store, client: redis.Redis) -> None:
    pass_deadline(client, "a")
    store.expire()


def _promote(store: Store, client: redis.Redis) -> None:
    client.zadd(keys.SCHEDULED, {"a": 1})
    store.promote()


def _reap(store: Store, client: redis.Redis) -> None:
    wipe_lease(client)
    store.reap()
    outlast_grace(client)
    store.reap()


def _settle(outcome: Outcome, attempt: int) -> Settlement:
    job = ClaimedJob(id="a", attempt=attempt, request=Request(prompt="x"), next_event=1)
    return failed(job) if outcome is Outcome.FAILED else ended(job, outcome, result())


ACTS: dict[str, Callable[[Store, redis.Redis], object]] = {
    "claim": lambda store, client: take(store),
    "claim another model": lambda store, client: take(store, card=OTHER),
    "cancel": lambda store, client: store.cancel("a"),
    "retry": lambda store, client: store.retry("a"),
    "delete": lambda store, client: store.delete("a"),
    "submit again": lambda store, client: add(store, "a"),
    "release": lambda store, client: store.release([("a", 1)]),
    "die": lambda store, client: kill(store),
    "expire": _expire,
    "promote": _promote,
    "reap": _reap,
    "renew": lambda store, client: store.renew("w", "busy", {"a": 1}, {}),
    "renew without it": lambda store, client: store.renew("w", "busy", {}, {}),
}
for name, number in itertools.product(Outcome, (1, 2)):
    ACTS[f"settle {name} as attempt {number}"] = functools.partial(
        lambda store, client, settlement: store.report([], [settlement]), settlement=_settle(name, number)
    )


def _reach(store: Store, client: redis.Redis, state: JobState) -> None:
    add(store, "a", deadline_seconds=60)
    if state is S.CANCELLED:
        store.cancel("a")
    elif state is S.EXPIRED:
        pass_deadline(client, "a")
        store.expire()
    elif state is not S.QUEUED:
        [job] = take(store)
        if state is S.SUCCEEDED:
            store.report([], [done(job)])
        elif state is S.FAILED:
            store.report([], [failed(job)])


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("act", ACTS)
def test_no_act_makes_a_move_that_the_table_does_not_list(
    store: Store, valkey: redis.Redis, state: JobState, act: str
) -> None:
    _reach(store, valkey, state)
    assert store.get("a").state is state
    after: JobState | None
    try:
        ACTS[act](store, valkey)
        after = store.get("a").state
    except (JobConflict, JobNotFound):
        after = None if act == "delete" and state in FINAL else store.get("a").state

    assert after in {state, None, *MOVES[state]}
    assert audit(valkey) == []


def test_kinds_are_indexed_apart(store: Store) -> None:
    store.submit(NewJob(id="p", request=Request(kind=Kind.PREDICT, token_ids=(1, 2))))
    add(store, "g")

    assert [job.id for job in store.list(kinds=[Kind.PREDICT])] == ["p"]
    assert store.get("p").kind is Kind.PREDICT
    assert [job.id for job in take(store)] == ["p", "g"]


def test_a_claim_that_finds_nothing_writes_nothing(store: Store, valkey: redis.Redis) -> None:
    """A busy worker asks after each step: with ``appendfsync always`` a write would cost it the disk's time."""
    born(store)
    add(store, "a")
    assert [job.id for job in take(store)] == ["a"]
    take(store, running=1)
    before = valkey.info("persistence")["rdb_changes_since_last_save"]
    for _ in range(3):
        assert take(store, running=1) == []

    assert valkey.info("persistence")["rdb_changes_since_last_save"] == before
