"""What the outbox promises between a report and its answer, against a real Valkey."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
import redis

from core.errors import StoreUnavailable
from core.request import TokenEvent
from jobs.job import JobState
from jobs.store import Store
from tests.conftest import Server, start_valkey
from tests.jobs_world import add, born, result, settings, take, text_of, token
from worker.outbox import Outbox
from worker.running import Running


@pytest.fixture
def store(own_valkey: Server) -> Iterator[Store]:
    store = Store(settings(own_valkey.url, durability="memory"))
    born(store)
    yield store
    store.close()


def start(store: Store, job_id: str = "a") -> Running:
    add(store, job_id)
    [job] = take(store)
    return Running.start(job, 0.0)


def events(job_id: str, *token_ids: int) -> list[TokenEvent]:
    return [token(job_id, token_id) for token_id in token_ids]


def put(outbox: Outbox, running: Running, *token_ids: int) -> None:
    for event in events(running.job_id, *token_ids):
        outbox.publish(running, event)


def test_a_report_is_on_its_way_while_the_engine_computes(store: Store, own_valkey: Server) -> None:
    outbox, running = Outbox(), start(store)
    put(outbox, running, 1)
    other = redis.Redis.from_url(own_valkey.url)
    other.execute_command("CLIENT", "PAUSE", 500, "WRITE")
    began = time.monotonic()
    outbox.send(store)
    sent = time.monotonic() - began
    outbox.hear()
    heard = time.monotonic() - began
    other.close()

    assert sent < 0.2
    assert heard > 0.3
    assert text_of(store.events("a")) == "w1 "


def test_what_happens_before_the_answer_is_sent_with_the_next_report(store: Store) -> None:
    outbox, running = Outbox(), start(store)
    put(outbox, running, 1, 2)
    outbox.send(store)
    put(outbox, running, 3)
    outbox.finish(running, result())
    assert running.published == 0
    outbox.hear()
    assert running.published == 2
    assert len(outbox) == 2
    assert outbox.settling == {"a": 1}
    outbox.send(store)
    outbox.hear()

    assert len(outbox) == 0
    assert text_of(store.events("a")) == "w1 w2 w3 "
    assert store.get("a").state is JobState.SUCCEEDED


def test_what_was_sent_and_never_answered_is_sent_again_and_is_there_once(store: Store, own_valkey: Server) -> None:
    outbox, running = Outbox(), start(store)
    put(outbox, running, 1)
    own_valkey.process.send_signal(signal.SIGSTOP)
    outbox.send(store)
    own_valkey.process.kill()
    own_valkey.process.wait()
    put(outbox, running, 2)
    with pytest.raises(StoreUnavailable):
        outbox.hear()
    with pytest.raises(StoreUnavailable):
        outbox.send(store)
    assert outbox.hear().refused == frozenset()  # nothing is on its way
    again = start_valkey(own_valkey.folder)
    try:
        outbox.send(store)
        outbox.hear()
        assert text_of(store.events("a")) == "w1 w2 "
    finally:
        again.process.kill()
        again.process.wait()


def test_answers_are_not_mistaken_for_another_commands(store: Store) -> None:
    """A report on its way has its connection to itself."""
    outbox, running = Outbox(), start(store)
    put(outbox, running, 1)
    outbox.send(store)

    assert store.get("a").attempt == 1
    assert store.queue().running == 1
    assert outbox.hear().refused == frozenset()


def test_a_job_that_was_taken_away_is_refused_and_forgotten(store: Store) -> None:
    outbox, running = Outbox(), start(store)
    put(outbox, running, 1)
    store.expire_lease("w")
    born(store)
    take(store)
    outbox.send(store)
    put(outbox, running, 2)
    refused = outbox.hear().refused
    for job_id in refused:
        outbox.drop(job_id)

    assert refused == {"a"}
    assert len(outbox) == 0
