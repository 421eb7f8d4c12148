"""What a log holds, running and ended: every event, byte for byte, and how much memory that takes."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from rq import Queue
from rq.serializers import JSONSerializer

from core.request import Choice, Request, Result, SamplingParams, TokenEvent, TokenLogprob, Usage
from jobs import commands, keys
from jobs.job import JobState, NewJob, Resume
from jobs.store import ClaimedJob, Outcome, Publication, Settlement, Store
from tests.jobs_world import (
    add,
    audit,
    born,
    claim,
    ended,
    failed,
    kill,
    numbers_of,
    result,
    say,
    settings,
    take,
    types,
)

VALUE = st.floats(-99, 0).map(lambda value: round(value, 6))
TOP = st.lists(st.tuples(st.integers(0, 70_000), VALUE), max_size=3).map(tuple)
LOGPROBS = st.builds(TokenLogprob, token_id=st.integers(0, 70_000), logprob=VALUE, top=TOP)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@st.composite
def token_events(draw: st.DrawFn) -> TokenEvent:
    token_ids = tuple(draw(st.lists(st.integers(0, 2**31 - 1), max_size=4)))
    logprobs = draw(st.none() | st.lists(LOGPROBS, min_size=1, max_size=3).map(tuple))
    return TokenEvent(
        job_id="a", index=draw(st.integers(0, 3)), text=draw(TEXT), token_ids=token_ids, logprobs=logprobs
    )


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    yield store
    store.close()


def publish(store: Store, job: ClaimedJob, events: Sequence[TokenEvent]) -> None:
    store.report([Publication(job_id=job.id, attempt=job.attempt, first=job.next_event, events=events)], [])


def all_of(events: Sequence[TokenEvent], text: str | None = None) -> Result:
    """The result that goes with the events: of each choice its joined text."""
    choices = []
    for index in sorted({event.index for event in events}):
        mine = [event for event in events if event.index == index]
        ids = tuple(token_id for event in mine for token_id in event.token_ids)
        whole = "".join(event.text for event in mine) if text is None else text
        choices.append(Choice(index=index, text=whole, finish_reason="length", token_ids=ids))
    return Result(usage=Usage(prompt_tokens=1), choices=tuple(choices))


def succeed(
    store: Store, job: ClaimedJob, with_result: Result, *, after: int = 0, last: Sequence[TokenEvent] = ()
) -> None:
    """End a job well; its last events, behind so many, come with the end."""
    end = Settlement(job_id=job.id, attempt=job.attempt, outcome=Outcome.SUCCEEDED, result=with_result)
    words = Publication(job_id=job.id, attempt=job.attempt, first=job.next_event + after, events=last)
    store.report([words] if last else [], [end])


@examples(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    events=st.lists(token_events(), max_size=12),
    early=st.integers(0, 12),
    how=st.sampled_from(["result", "other text", "failed"]),
)
def test_an_ended_log_replays_what_was_streamed_event_for_event(
    store: Store, valkey: redis.Redis, events: list[TokenEvent], early: int, how: str
) -> None:
    """And what came with the end."""
    valkey.flushall()
    born(store)
    add(store, "a", resume=Resume.ANY if how == "other text" else Resume.RESTART)  # only then texts may differ
    [job] = take(store)
    streamed, last = (events, []) if how == "failed" else (events[:early], events[early:])
    publish(store, job, streamed)
    running = store.events("a")
    if how == "failed":
        store.report([], [failed(job)])
    else:
        succeed(store, job, all_of(events, None if how == "result" else "another"), after=len(streamed), last=last)
    over = store.events("a")

    assert over[: len(running)] == running
    assert [(each.fields["index"], each.fields["text"], each.fields["token_ids"]) for each in over[1:-1]] == [
        (event.index, event.text, [*event.token_ids]) for event in events
    ]
    assert [len(each.fields.get("logprobs", ())) for each in over[1:-1]] == [len(e.logprobs or ()) for e in events]
    assert types(over[-1:]) == "f"
    assert numbers_of(over) == list(range(len(events) + 2))
    assert [store.events("a", number) for number in range(-1, len(over))] == [
        over[number + 1 :] for number in range(-1, len(over))
    ]
    assert audit(valkey) == []


def test_token_ids_and_log_probabilities_are_kept_once_and_shown_with_the_result(
    store: Store, valkey: redis.Redis
) -> None:
    logprob = TokenLogprob(token_id=7, logprob=-0.25, top=((7, -0.25), (8, -1.5)))
    events = [TokenEvent(job_id="a", index=i % 2, text=f"{i}é ", token_ids=(i,), logprobs=(logprob,)) for i in range(6)]
    add(store, "a")
    [job] = take(store)
    publish(store, job, events)
    succeed(store, job, all_of(events))
    [first, second] = (store.get("a").result or {})["choices"]

    assert (first["text"], first["token_ids"]) == ("0é 2é 4é ", [0, 2, 4])
    assert (second["text"], second["token_ids"]) == ("1é 3é 5é ", [1, 3, 5])
    assert first["logprobs"] == [logprob.to_wire()] * 3
    stored: Any = valkey.xrange(f"{keys.RESULTS}a")
    assert b"logprob" not in base64.b64decode(stored[0][1][b"return_value"])


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_long_log_is_packed_in_bounded_pieces_and_readable_meanwhile(
    store: Store, valkey: redis.Redis, attempts: int
) -> None:
    add(store, "a")
    for _ in range(attempts):
        born(store)
        [job] = take(store)
        said = [TokenEvent(job_id="a", text=f"{n} ", token_ids=(n,)) for n in range(5_000)]
        publish(store, job, said[:-2])
        if job.attempt < attempts:
            publish(store, job, said)
            kill(store)
    text = "".join(event.text for event in said) * attempts
    whole = all_of([TokenEvent(job_id="a", text=text, token_ids=())])
    succeed(store, job, whole, after=4_998, last=said[-2:])
    meanwhile, result_meanwhile = store.events("a"), store.get("a").result
    assert valkey.scard(keys.UNPACKED) == 1
    assert audit(valkey) == []
    store.expire()

    assert valkey.scard(keys.UNPACKED) == 0
    assert valkey.xlen(f"{keys.EVENTS}a") <= 1
    assert store.events("a") == meanwhile
    assert len(meanwhile) == attempts * 5_001 + 1
    assert numbers_of(meanwhile) == list(range(len(meanwhile)))
    assert store.get("a").result == result_meanwhile
    assert len((result_meanwhile or {})["choices"][0]["token_ids"]) == attempts * 5_000
    assert audit(valkey) == []


@pytest.mark.parametrize(("tokens", "left"), [(4_094, 0), (4_095, 1)])
def test_a_log_of_one_piece_is_packed_at_once(store: Store, valkey: redis.Redis, tokens: int, left: int) -> None:
    """Of 4,096 events, though only what is in the stream with its start and without its end and last words counts."""
    add(store, "a")
    [job] = take(store)
    said = [TokenEvent(job_id="a", text="w", token_ids=(1,)) for _ in range(tokens + 1)]
    publish(store, job, said[:-1])
    succeed(store, job, all_of(said), after=tokens, last=said[-1:])

    assert valkey.scard(keys.UNPACKED) == left
    assert types(store.events("a")) == "s" + "t" * (tokens + 1) + "f"
    assert audit(valkey) == []


def test_what_is_in_the_log_already_changes_nothing_though_no_token_came_with_it(
    store: Store, valkey: redis.Redis
) -> None:
    """Text that was held back as a stop string might begin in it."""
    add(store, "a")
    [job] = take(store)
    said = Publication(
        job_id="a",
        attempt=job.attempt,
        first=job.next_event,
        events=[TokenEvent(job_id="a", text="w", token_ids=())],
    )
    store.report([said], [])
    before = valkey.hgetall(f"{keys.JOB}a")

    assert store.report([said], []).refused == frozenset()
    assert valkey.hgetall(f"{keys.JOB}a") == before


def test_a_token_takes_two_bytes_of_a_packed_log(store: Store, valkey: redis.Redis) -> None:
    sizes = []
    for job_id, tokens in (("a", 10), ("b", 11)):
        add(store, job_id)
        [job] = take(store)
        store.report([say(job, *[1] * tokens)], [])
        succeed(store, job, result("w1 " * tokens))
        sizes.append(valkey.hstrlen(f"{keys.JOB}{job_id}", "log"))

    assert sizes[1] - sizes[0] == 2  # its length and what it is, and its id


@pytest.mark.parametrize(
    "ids",
    [
        tuple(number * 7 % 50_000 for number in range(20_000)),
        (65_535, 65_535),
        (65_536, 1),
        (65_535,),
        (65_536,),
        (2**32 - 1,),
        (2**32 - 1, 0),
    ],
)
def test_an_event_of_many_tokens_or_large_ids_is_packed_whole(store: Store, ids: tuple[int, ...]) -> None:
    """As after an outage, in which all that was drawn becomes one event."""
    add(store, "a")
    [job] = take(store)
    event = TokenEvent(job_id="a", text="w", token_ids=ids)
    store.report([Publication(job_id="a", attempt=job.attempt, first=job.next_event, events=[event])], [])
    succeed(store, job, result("w"))

    _, packed, _ = store.events("a")
    assert tuple(packed.fields["token_ids"]) == ids


def test_a_log_that_ends_while_it_is_long_is_forgotten_whole(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    publish(store, job, [TokenEvent(job_id="a", text="x", token_ids=(1,))] * 5_000)
    store.report([], [failed(job)])
    store.delete("a")
    store.expire()

    assert valkey.keys("*:a") == []
    assert valkey.scard(keys.UNPACKED) == 0


def test_a_long_log_that_is_still_to_be_packed_when_its_job_is_retried_leaves_the_next_one_alone(
    store: Store, valkey: redis.Redis
) -> None:
    add(store, "a")
    [job] = take(store)
    publish(store, job, [TokenEvent(job_id="a", text="x", token_ids=(1,))] * 5_000)
    store.report([], [failed(job)])
    store.retry("a")
    [job] = take(store)
    store._runner.run(commands.follow("a", -1))
    store.report([], [failed(job)])
    before = store.events("a")
    store.expire()

    assert store.events("a") == before
    assert [event.type for event in before] == ["started", "finished"]


@pytest.mark.parametrize("gone", [keys.EVENTS, keys.JOB])
def test_of_a_long_log_that_somebody_deleted_nothing_more_is_packed(
    store: Store, valkey: redis.Redis, gone: str
) -> None:
    add(store, "a")
    [job] = take(store)
    publish(store, job, [TokenEvent(job_id="a", text="x", token_ids=(1,))] * 5_000)
    store.report([], [failed(job)])
    valkey.delete(f"{gone}a")
    store.expire()

    assert valkey.scard(keys.UNPACKED) == 0
    assert not valkey.hexists(f"{keys.JOB}a", "log") or gone == keys.EVENTS


def test_a_job_whose_result_is_kept_for_no_time_can_be_read_to_its_end(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    valkey.hset(f"{keys.JOB}a", "result_ttl", 0)  # what stock RQ calls result_ttl=0
    [job] = take(store)
    store.report([say(job, 1, 2)], [])
    succeed(store, job, result("w1 w2 ", 1, 2))

    assert types(store.events("a")) == "sttf"
    assert 0 < valkey.ttl(f"{keys.EVENTS}a") <= 60
    assert valkey.zscore(keys.RETENTION, "a") is None
    assert audit(valkey) == []


@pytest.mark.parametrize("by_rq", [False, True])
def test_a_job_may_take_the_name_of_one_that_is_just_forgotten(store: Store, valkey: redis.Redis, by_rq: bool) -> None:
    add(store, "a")
    valkey.hset(f"{keys.JOB}a", "result_ttl", 0)
    [job] = take(store)
    store.report([say(job, 1, 2)], [])
    succeed(store, job, result("w1 w2 ", 1, 2))
    if by_rq:
        queue = Queue("generate", connection=valkey, serializer=JSONSerializer)
        queue.enqueue("headrace.generate", {"input": {"prompt": "Once"}}, job_id="a")
    else:
        add(store, "a")
        assert types(store.events("a")) == ""
    [again] = take(store)
    store.report([say(again, 3)], [])

    assert types(store.events("a")) == "st"
    assert audit(valkey) == []


def test_a_job_with_the_name_of_a_long_one_that_was_deleted_keeps_its_log(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    publish(store, job, [TokenEvent(job_id="a", text="x", token_ids=(1,))] * 5_000)
    store.report([], [failed(job)])
    store.delete("a")
    add(store, "a")
    take(store)
    store.expire()

    assert types(store.events("a")) == "s"
    assert audit(valkey) == []


def test_a_stream_is_woken_by_the_end_though_the_log_is_packed_at_once(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    store._runner.run(commands.follow("a", -1))
    store.report([say(job, 1)], [ended(job, Outcome.CANCELLED, result())])
    entries: Any = valkey.xrange(f"{keys.EVENTS}a")

    assert entries == [(b"3-0", {b"f": b"1"})]
    assert 0 < valkey.pttl(f"{keys.EVENTS}a") <= 2000


def test_of_a_log_that_nobody_follows_nothing_is_left_beside_what_is_packed(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    store.report([say(job, 1)], [ended(job, Outcome.CANCELLED, result())])

    assert not valkey.exists(f"{keys.EVENTS}a")


# -- memory

#: 4.4 characters a token, as in English prose.
WORDS = "the cat sat on mat and saw many birds fly over hill to far rivers under sun so it ran home".split()  # noqa: SIM905


def finish_job(store: Store, number: int) -> str:
    """A job like most: an English prompt of 400 characters, 200 tokens in answer, one event each."""
    prompt = " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(120))[:400]
    job_id = f"job_{number:032x}"
    store.submit(NewJob(id=job_id, request=Request(prompt=prompt, params=SamplingParams(max_tokens=200))))
    [job] = claim(store).jobs
    events = [
        TokenEvent(job_id=job_id, text=f" {WORDS[(number + i) % len(WORDS)]}", token_ids=((number + 613 * i) % 49_152,))
        for i in range(200)
    ]
    publish(store, job, events)
    running: Any = store.connection.memory_usage(f"{keys.EVENTS}{job_id}", samples=0)
    assert running <= 60 * 200, "a running log holds at most 60 bytes a token"
    succeed(store, job, all_of(events))
    assert store.get(job_id).state is JobState.SUCCEEDED
    return job_id


def test_a_finished_job_of_200_tokens_takes_at_most_4_kilobytes_with_everything(
    store: Store, valkey: redis.Redis
) -> None:
    """All that Redis holds more than before: hash, result, log, registries and index."""
    for number in range(30):
        finish_job(store, number)
    before = valkey.info("memory")["used_memory_dataset"]
    for number in range(30, 130):
        finish_job(store, number)
    grown = (valkey.info("memory")["used_memory_dataset"] - before) / 100

    assert grown <= 4_096, grown
