"""What the loop promises, with a worker in a thread, a real Valkey and the store on both sides."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from core.instant import InstantConfig, InstantEngine
from core.request import Emitted, FinishedEvent, Kind, Request, SamplingParams
from jobs import commands
from jobs.job import FINAL, Job, JobState, NewJob, Resume
from jobs.store import Store, Wanted, WorkerCard
from tests.worker_world import eventually, store_settings, working


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store.connect(store_settings(valkey_url))
    yield store
    store.close()


def submit(
    store: Store,
    job_id: str,
    prompt: str = "x",
    seconds: float | None = None,
    resume: Resume = Resume.RESTART,
    **params: Any,
) -> str:
    request = Request(prompt=prompt, params=SamplingParams.from_wire(params))
    store.submit(NewJob(id=job_id, request=request, deadline_seconds=seconds, resume=resume))
    return job_id


def ended(store: Store, job_id: str) -> Job:
    def read() -> Job | None:
        job = store.get(job_id)
        return job if job.state in FINAL else None

    job: Job = eventually(read, f"end of {job_id}")
    return job


def published(store: Store, job_id: str, count: int = 3) -> None:
    eventually(lambda: store.get(job_id).tokens_generated >= count, "tokens")


def text_of(store: Store, job_id: str) -> str:
    """The stream's text, its numbers checked."""
    events = store.events(job_id)
    assert [event.number for event in events] == list(range(len(events)))
    assert [event.type for event in events].count("finished") == 1
    return "".join(event.fields["text"] for event in events if event.type == "token")


def test_many_jobs_of_both_kinds_succeed_once_and_in_batches(store: Store, valkey_url: str) -> None:
    ids = [submit(store, f"j{n}", f"prompt {n}", max_tokens=1 + n % 30) for n in range(100)]
    store.submit(NewJob(id="p", request=Request(kind=Kind.PREDICT, token_ids=(12, 7))))
    engine = InstantEngine(InstantConfig(step_seconds=0.001))
    with working(valkey_url, engine):
        jobs = [ended(store, job_id) for job_id in [*ids, "p"]]
        card = eventually(
            lambda: next((c for c in store.workers() if c.stats.get("steps") == engine.stats.steps), None)
        )

    assert {(job.state, job.attempt) for job in jobs} == {(JobState.SUCCEEDED, 1)}
    assert [job.tokens_generated for job in jobs] == [1 + n % 30 for n in range(100)] + [0]
    assert (jobs[-1].result or {})["token_ids"] == [85, 50]
    assert max(engine.stats.decode_rows) >= 30
    assert card.stats["decode_rows"] == {str(rows): steps for rows, steps in engine.stats.decode_rows.items()}
    assert 0 < card.stats["loop_seconds"] < 20
    assert card.stats["step_seconds"] > 0


@pytest.mark.parametrize(
    ("seconds", "state", "reason"), [(None, "cancelled", "cancelled"), (1.0, "expired", "deadline")]
)
def test_a_running_job_that_is_ended_early_keeps_what_it_has(
    store: Store, valkey_url: str, seconds: float | None, state: str, reason: str
) -> None:
    with working(valkey_url, step_ms=10):
        submit(store, "a", max_tokens=100_000, seconds=seconds, stop=["never"])
        submit(store, "b", max_tokens=40)
        published(store, "a")
        if seconds is None:
            store.cancel("a")
        job, neighbour = ended(store, "a"), ended(store, "b")

    assert (job.state, neighbour.state) == (JobState(state), JobState.SUCCEEDED)
    [choice] = (job.result or {})["choices"]
    assert choice["finish_reason"] == reason
    assert choice["text"] == text_of(store, "a") != ""


def test_a_request_that_cannot_be_computed_fails_at_once_by_name(store: Store, valkey_url: str) -> None:
    store.submit(NewJob(id="a", request=Request(kind=Kind.PREDICT, token_ids=(5000,))))
    submit(store, "f", "!fail")
    with working(valkey_url):
        refused, failed = ended(store, "a"), ended(store, "f")

    assert refused.state is failed.state is JobState.FAILED
    assert (refused.error or {})["code"] == "invalid_field"
    assert (refused.error or {})["param"] == "input.token_ids"
    assert (failed.error or {})["code"] == "engine_error"


def test_a_handed_back_job_goes_on_to_the_same_text(store: Store, valkey_url: str) -> None:
    submit(store, "a", max_tokens=400, temperature=1.0, stop=["never ever"], logprobs=1)
    for _ in range(3):
        with working(valkey_url, step_ms=5):
            before = store.get("a").tokens_generated
            eventually(lambda before=before: store.get("a").tokens_generated > before + 5)  # type: ignore[misc]
    with working(valkey_url):
        job = ended(store, "a")
    submit(store, "b")
    undisturbed = InstantEngine()
    undisturbed.add("a", Request(prompt="x", params=SamplingParams(max_tokens=400, temperature=1.0, logprobs=1)))
    while not undisturbed.idle:
        last = undisturbed.step()[-1]

    assert job.attempt == 4
    assert job.crashes == 0
    assert job.result == last.result.to_wire()  # type: ignore[union-attr]
    assert text_of(store, "a") == (job.result or {})["choices"][0]["text"]


def undisturbed_result(prompt: str, job_id: str, **params: Any) -> dict[str, Any]:
    engine = InstantEngine()
    engine.add(job_id, Request(prompt=prompt, params=SamplingParams.from_wire(params)))
    while True:
        for event in engine.step():
            if isinstance(event, FinishedEvent):
                return event.result.to_wire()


def check_choices(store: Store, job: Job) -> None:
    """Each choice's pieces in the log, joined, are its text; every token was counted and said once."""
    result = job.result or {}
    events = [event for event in store.events(job.id) if event.type == "token"]
    for choice in result["choices"]:
        mine = [event.fields for event in events if event.fields["index"] == choice["index"]]
        assert "".join(fields["text"] for fields in mine) == choice["text"]
        assert [token_id for fields in mine for token_id in fields["token_ids"]] == choice["token_ids"]
    said = sum(len(event.fields["token_ids"]) for event in events)
    assert job.tokens_generated == result["usage"]["completion_tokens"] == said


def test_a_handed_back_job_goes_on_to_the_same_three_texts(store: Store, valkey_url: str) -> None:
    params: dict[str, Any] = {"max_tokens": 60, "n": 3, "temperature": 1.0, "stop": ["never ever"], "logprobs": 1}
    submit(store, "a", **params)
    engine = InstantEngine(InstantConfig(step_seconds=0.005, max_running=2))  # the third choice lags behind
    for before in (5, 130):
        with working(valkey_url, engine if before == 5 else None, step_ms=5, publish_unread_seconds=0):
            published(store, "a", before)
        engine.drop("a")
    with working(valkey_url):
        job = ended(store, "a")

    assert (job.attempt, job.crashes, job.tokens_generated) == (3, 0, 180)
    assert job.result == undisturbed_result("x", "a", **params)
    assert text_of(store, "a")
    check_choices(store, job)


def test_a_job_with_one_choice_cut_short_is_cancelled_and_keeps_all(store: Store, valkey_url: str) -> None:
    word = undisturbed_result("x", "a", n=2)["choices"][1]["text"].split()[4]
    with working(valkey_url, step_ms=10):
        submit(store, "a", max_tokens=100_000, n=2, stop=[word])
        published(store, "a", 30)
        store.cancel("a")
        job = ended(store, "a")

    assert job.state is JobState.CANCELLED
    assert [choice["finish_reason"] for choice in (job.result or {})["choices"]] == ["cancelled", "stop"]
    check_choices(store, job)


def test_another_engine_starts_over_what_nobody_has_read(store: Store, valkey_url: str) -> None:
    submit(store, "a", max_tokens=100)
    with working(valkey_url, step_ms=10):
        published(store, "a")
    other = InstantEngine()
    other.card = dataclasses.replace(other.card, dtype="bfloat16")
    with working(valkey_url, other):
        job = ended(store, "a")
    engines = [event.fields["engine"]["dtype"] for event in store.events("a") if event.type == "started"]

    assert job.state is JobState.SUCCEEDED
    assert engines == ["none", "bfloat16"]
    assert text_of(store, "a") == (job.result or {})["choices"][0]["text"]
    assert (job.result or {})["usage"]["completion_tokens"] == 100


@pytest.mark.parametrize("age_seconds", [0.2, 1.1])
def test_who_begins_to_read_in_the_middle_of_an_answer_waits_for_no_report_of_all(
    store: Store, valkey_url: str, age_seconds: float
) -> None:
    with working(valkey_url, step_ms=10, publish_unread_seconds=60):
        submit(store, "a", max_tokens=100_000)
        published(store, "a", 1)
        time.sleep(age_seconds)
        assert store.get("a").tokens_generated < 10
        store._runner.run(commands.follow("a", -1))
        published(store, "a", 15)


def test_the_first_token_of_a_job_that_is_waited_for_is_published_at_once_only_to_who_reads_along(
    store: Store, valkey_url: str
) -> None:
    with working(valkey_url, step_ms=10, publish_unread_seconds=60):
        request = Request(prompt="x", params=SamplingParams(max_tokens=100_000))
        store.submit(NewJob(id="a", request=request, awaited=True))
        eventually(lambda: store.get("a").state is JobState.RUNNING, "a claim")
        time.sleep(0.2)
        assert store.get("a").tokens_generated == 0
        store._runner.run(commands.follow("a", -1))
        published(store, "a", 15)


def test_an_engine_with_another_vocabulary_cannot_go_on_even_where_any_may(store: Store, valkey_url: str) -> None:
    submit(store, "a", resume=Resume.ANY, max_tokens=100)
    with working(valkey_url, step_ms=10):
        published(store, "a")
    other = InstantEngine()
    other.card = dataclasses.replace(other.card, dtype="bfloat16", vocab_size=1)
    with working(valkey_url, other):
        job = ended(store, "a")

    assert (job.error or {})["code"] == "engine_changed"
    assert "retry" in (job.error or {})["message"]


class Witness(InstantEngine):
    """Remembers each job that joined, and how many tokens had been drawn by then."""

    def __init__(self, **config: Any) -> None:
        super().__init__(InstantConfig(**config))
        self.joined: dict[str, int] = {}
        self.beside: dict[str, int] = {}  # how many others ran when it joined

    def add(self, job_id: str, request: Request, emitted: tuple[Emitted, ...] = ()) -> None:
        self.joined[job_id] = self.stats.generated_tokens
        self.beside[job_id] = len(self._jobs)
        super().add(job_id, request, emitted)


def make_suspect(store: Store, job_id: str) -> None:
    """Two workers die with it before it has a token."""
    card = InstantEngine().card
    for name in ("doomed", "damned"):
        store.birth(WorkerCard(name=name, host="h", pid=1, model=card))
        assert [job.id for job in store.claim(Wanted(name, card, 1, 0)).jobs] == [job_id]
        store.expire_lease(name)
    assert store.get(job_id).crashes == 2


def test_a_suspect_starts_alone_and_others_join_when_two_tokens_are_published(store: Store, valkey_url: str) -> None:
    submit(store, "suspect", max_tokens=30)
    make_suspect(store, "suspect")
    ids = [submit(store, f"j{n}") for n in range(5)]
    engine = Witness(step_seconds=0.005)
    with working(valkey_url, engine):
        states = {ended(store, job_id).state for job_id in [*ids, "suspect"]}

    assert states == {JobState.SUCCEEDED}
    assert engine.joined == {"suspect": 0, **dict.fromkeys(ids, 3)}  # two are published once the third is drawn


def test_a_waiting_suspect_gets_an_empty_worker_though_the_queue_does_not_end(store: Store, valkey_url: str) -> None:
    engine = Witness(step_seconds=0.005, max_running=4)
    with working(valkey_url, engine):
        for n in range(4):
            published(store, submit(store, f"first{n}", max_tokens=200))
        submit(store, "suspect", max_tokens=3)
        make_suspect(store, "suspect")
        ids = [submit(store, f"j{n}", max_tokens=20 + n % 60) for n in range(120)]
        job = ended(store, "suspect")

    assert job.state is JobState.SUCCEEDED
    assert engine.beside["suspect"] == 0
    assert any(job_id not in engine.joined for job_id in ids), "the queue ended: the test proved nothing"


def test_jobs_of_a_claim_whose_reply_was_lost_are_handed_back(store: Store, valkey_url: str) -> None:
    engine = InstantEngine(InstantConfig(step_seconds=0.005, max_running=1))
    with working(valkey_url, engine):
        submit(store, "long", max_tokens=200)
        published(store, "long")
        submit(store, "lost")
        assert [job.id for job in store.claim(Wanted("w1", engine.card, 1, 1)).jobs] == ["lost"]
        lost, long = ended(store, "lost"), ended(store, "long")

    assert (lost.state, lost.attempt, lost.crashes) == (JobState.SUCCEEDED, 2, 0)
    assert long.attempt == 1


def test_an_idle_worker_hardly_talks_and_yet_sees_a_job_at_once(
    store: Store, valkey: redis.Redis, valkey_url: str
) -> None:
    def commands() -> int:
        return int(valkey.info("stats")["total_commands_processed"])

    with working(valkey_url):
        submit(store, "warm")
        ended(store, "warm")
        before, start = commands(), time.monotonic()
        time.sleep(1)  # idleness itself is measured
        spent = (commands() - before) / (time.monotonic() - start)
        submit(store, "a", max_tokens=1)
        job = ended(store, "a")

    assert spent < 500, f"{spent:.0f} commands a second, ticks of 0.1 s included"
    assert (job.started_at or 0) - job.created_at < 0.5


def test_a_worker_that_rq_forgot_appears_again(store: Store, valkey: redis.Redis, valkey_url: str) -> None:
    with working(valkey_url):
        eventually(lambda: valkey.sismember("rq:workers", "rq:worker:w1"))
        valkey.delete("rq:worker:w1")
        valkey.srem("rq:workers", "rq:worker:w1")

        eventually(lambda: valkey.sismember("rq:workers", "rq:worker:w1") and valkey.hget("rq:worker:w1", "birth"))


def test_the_engine_computes_on_while_redis_takes_its_time(store: Store, valkey: redis.Redis, valkey_url: str) -> None:
    """Its answers are waited for beside the steps."""
    engine = InstantEngine(InstantConfig(step_seconds=0.005))
    with working(valkey_url, engine, publish_unread_seconds=0):
        submit(store, "a", max_tokens=1_000)
        published(store, "a")
        valkey.execute_command("CLIENT", "PAUSE", 400, "WRITE")
        began, before = time.monotonic(), engine.stats.steps
        valkey.set("a write that waits", 1)
        waited, steps = time.monotonic() - began, engine.stats.steps - before
        store.cancel("a")
        ended(store, "a")

    assert waited > 0.3
    assert steps > 20
    assert text_of(store, "a")
