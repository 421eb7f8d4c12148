"""What the outbox promises between a report and its answer, against a real Valkey."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from core.errors import StoreUnavailable
from core.request import TokenEvent, TokenLogprob
from jobs.job import JobState
from jobs.store import Publication, Reported, Settlement, Store, Wanted
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


def report(outbox: Outbox, store: Store, *, everything: bool = True) -> Reported:
    """Say all and hear the answer."""
    said = outbox.draw(everything=everything)
    reported = store.report(said.publications, said.settlements)
    outbox.confirm(said)
    return reported


def test_what_happens_before_the_answer_is_sent_with_the_next_report(store: Store) -> None:
    outbox, running = Outbox(), start(store)
    put(outbox, running, 1, 2)
    said = outbox.draw(everything=True)
    store.report(said.publications, said.settlements)
    put(outbox, running, 3)
    outbox.finish(running, result())
    assert running.published == 0
    outbox.confirm(said)
    assert running.published == 2
    assert len(outbox) == 2
    assert outbox.settling == {"a": 1}
    report(outbox, store)

    assert len(outbox) == 0
    assert text_of(store.events("a")) == "w1 w2 w3 "
    assert store.get("a").state is JobState.SUCCEEDED


def test_what_was_sent_and_never_answered_is_sent_again_and_is_there_once(store: Store, own_valkey: Server) -> None:
    outbox, running = Outbox(), start(store)
    put(outbox, running, 1)
    own_valkey.process.kill()
    own_valkey.process.wait()
    for token_id in (2, 3):
        with pytest.raises(StoreUnavailable):
            report(outbox, store)
        put(outbox, running, token_id)
    again = start_valkey(own_valkey.folder)
    try:
        report(outbox, store)
        assert text_of(store.events("a")) == "w1 w2 w3 "
    finally:
        again.process.kill()
        again.process.wait()


def test_a_job_that_was_taken_away_is_refused_and_forgotten(store: Store) -> None:
    outbox, running = Outbox(), start(store)
    put(outbox, running, 1)
    store.expire_lease("w")
    born(store)
    take(store)
    refused = report(outbox, store).refused
    put(outbox, running, 2)
    for job_id in refused:
        outbox.drop(job_id)

    assert refused == {"a"}
    assert len(outbox) == 0


# -- several steps, one report


def score(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-token_id / 4, top=((token_id, -token_id / 4), (0, -9.0)))


def said_by(store: Store, job_id: str) -> list[tuple[int, dict[str, Any]]]:
    """Number and fields of each token event in the log."""
    return [(event.number, event.fields) for event in store.events(job_id) if event.type == "token"]


def fields(index: int, *token_ids: int) -> dict[str, Any]:
    return {"index": index, "text": "".join(f"w{each} " for each in token_ids), "token_ids": [*token_ids]}


def test_the_tokens_of_several_steps_in_one_report_are_one_event_a_choice(store: Store) -> None:
    outbox, running = Outbox(), start(store)
    for step in ((1, 2), (3, 4), (5, 6)):
        for index, token_id in enumerate(step):
            scored = {"logprobs": (score(token_id),)} if index else {}
            outbox.publish(running, token("a", token_id, index=index, **scored))
    outbox.publish(running, TokenEvent(job_id="a", text="", token_ids=(7,)))
    report(outbox, store)

    scores = [score(token_id).to_wire() for token_id in (2, 4, 6)]
    first = {"index": 0, "text": "w1 w3 w5 ", "token_ids": [1, 3, 5, 7]}
    assert said_by(store, "a") == [(1, first), (2, {**fields(1, 2, 4, 6), "logprobs": scores})]
    assert running.published == 7
    assert store.get("a").tokens_generated == 7
    assert [each.token_ids for each in store.emitted("a")] == [(1, 3, 5, 7), (2, 4, 6)]


def test_each_job_in_a_report_has_events_of_its_own(store: Store) -> None:
    outbox, jobs = Outbox(), [start(store, "a"), start(store, "b")]
    for token_id in (1, 2):
        for running in jobs:
            put(outbox, running, token_id)
    report(outbox, store)

    assert said_by(store, "a") == said_by(store, "b") == [(1, fields(0, 1, 2))]


def test_the_first_token_of_a_job_that_has_waited_goes_with_the_others_of_its_kind_and_says_when_it_was(
    store: Store,
) -> None:
    now = [100.0]
    outbox, young = Outbox(lambda: now[0]), start(store, "young")
    old = dataclasses.replace(start(store, "old"), young=False)
    put(outbox, old, 1)
    assert not outbox.pressing
    put(outbox, young, 1)
    assert outbox.pressing
    said = outbox.draw(everything=False)
    assert {each.job_id for each in said.publications} == {"young"}
    store.report(said.publications, said.settlements)
    outbox.confirm(said)
    now[0] += 0.7
    put(outbox, old, 2)
    put(outbox, young, 2)
    assert (outbox.pressing, outbox.draw(everything=False).publications) == (False, [])
    said = outbox.draw(everything=True)
    assert {each.job_id: each.age_ms for each in said.publications} == {"young": 700, "old": 700}
    before, at = store.get("young").first_token_at, store.connection.time()
    store.report(said.publications, said.settlements)

    assert store.get("young").first_token_at == before
    assert store.get("old").first_token_at == pytest.approx(at[0] + at[1] / 1e6 - 0.7, abs=0.2)


def test_the_first_token_of_an_answer_that_is_said_at_its_end_says_when_it_was(store: Store) -> None:
    now = [100.0]
    outbox, running = Outbox(lambda: now[0]), dataclasses.replace(start(store, "a"), young=False)
    put(outbox, running, 1)
    now[0] += 0.5
    outbox.finish(running, result("w1 ", 1))
    said = outbox.draw(everything=False)
    at = store.connection.time()
    store.report(said.publications, said.settlements)

    job = store.get("a")
    assert (job.state, job.tokens_generated) == (JobState.SUCCEEDED, 1)
    assert job.first_token_at == pytest.approx(at[0] + at[1] / 1e6 - 0.5, abs=0.2)


class Unheard(Store):
    """Loses replies: the report is done, or nothing of it is, and the outbox is told that Redis is away."""

    lose = ""  #: "reply" or "report"; empty: nothing is lost
    sent: list[list[tuple[int, TokenEvent]]]  #: what each report held, by number

    def report(
        self, publications: Sequence[Publication], settlements: Sequence[Settlement], wanted: Wanted | None = None
    ) -> Reported:
        self.sent.append([(p.first + n, event) for p in publications for n, event in enumerate(p.events)])
        reported = Reported() if self.lose == "report" else super().report(publications, settlements, wanted)
        if self.lose:
            raise StoreUnavailable("away")
        return reported


@pytest.fixture
def unheard(own_valkey: Server) -> Iterator[Unheard]:
    store = Unheard(settings(own_valkey.url, durability="memory"))
    store.sent = []
    born(store)
    yield store
    store.close()


def lose_report(outbox: Outbox, store: Unheard, what: str) -> None:
    store.lose = what
    with pytest.raises(StoreUnavailable):
        report(outbox, store)
    store.lose = ""


@pytest.mark.parametrize("what", ["reply", "report"])
def test_what_was_sent_and_never_answered_keeps_its_numbers_and_its_content_though_more_tokens_came(
    unheard: Unheard, what: str
) -> None:
    """A half-known event would swallow the tokens that joined it, or repeat its own."""
    outbox, running = Outbox(), start(unheard)
    put(outbox, running, 1, 2)
    lose_report(outbox, unheard, what)
    put(outbox, running, 3, 4)
    lose_report(outbox, unheard, what)
    put(outbox, running, 5)
    report(outbox, unheard)
    put(outbox, running, 6)
    outbox.finish(running, result())
    report(outbox, unheard)

    first, second, third, last = unheard.sent
    assert second[:1] == first
    assert third[:2] == second
    assert [number for number, _ in third + last] == [1, 2, 3, 4]
    assert said_by(unheard, "a") == [(1, fields(0, 1, 2)), (2, fields(0, 3, 4)), (3, fields(0, 5)), (4, fields(0, 6))]
    assert running.published == 6
    assert unheard.get("a").state is JobState.SUCCEEDED
    assert len(outbox) == 0


@pytest.mark.parametrize(
    ("jobs", "told"),
    [
        ([{"priority": -5}], True),
        ([{}], True),
        ([{"priority": 7}], True),
        ([{"model": "TOY", "priority": 7}], True),
        ([], False),
    ],
)
def test_a_report_tells_whether_jobs_wait_that_this_worker_may_claim(
    store: Store, jobs: list[dict[str, Any]], told: bool
) -> None:
    outbox, running = Outbox(), start(store)
    for job in jobs:
        add(store, **job)
    put(outbox, running, 1)

    assert report(outbox, store).waiting is told


# -- what nobody reads along can wait


def test_first_tokens_what_is_read_along_and_what_ends_is_said_at_once_and_the_rest_with_everything(
    store: Store,
) -> None:
    outbox, jobs = Outbox(), [start(store, job_id) for job_id in ("new", "read", "unread", "ended")]
    _, read, unread, ended = jobs
    for running in jobs[1:]:
        put(outbox, running, 1)
    report(outbox, store)
    read.watched = True
    for running in jobs:
        put(outbox, running, 2)
    outbox.finish(ended, result())
    said = outbox.draw(everything=False)
    assert [each.job_id for each in said.publications] == ["new", "read", "ended"]
    assert [each.job_id for each in said.settlements] == ["ended"]
    outbox.confirm(said)
    put(outbox, unread, 3)

    assert [each.job_id for each in outbox.draw(everything=True).publications] == ["unread"]
    assert not outbox.draw(everything=False)
