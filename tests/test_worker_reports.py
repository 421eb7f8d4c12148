"""When the loop reports, with a clock that only steps and looks move: short steps share a report, long ones do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

import pytest

from core.errors import StoreUnavailable
from core.instant import InstantConfig, InstantEngine
from core.request import Emitted, Request, SamplingParams
from jobs.connection import connect
from jobs.job import JobState, NewJob
from jobs.lookout import Lookout
from jobs.store import Claim, Publication, Reported, Settlement, Store, Wanted, WorkerCard
from tests.worker_world import store_settings
from worker.engine_process import divide_cores
from worker.loop import Worker
from worker.outage import ASK_SECONDS, Pace
from worker.presence import Presence
from worker.pulse import Pulse
from worker.rq_worker import RqWorker
from worker.settings import WorkerSettings
from worker.stop import Stop
from worker.talk import Talk
from worker.upkeep import Upkeep

P = ParamSpec("P")
T = TypeVar("T")

UNIT = 1 / 64  #: seconds; floating point knows it exactly
LOOK = UNIT / 2**16  #: what a look at the clock takes, so that a loop that waits for a time gets there


class FakeClock:
    """Stands still but for sleeps, and a little at each look."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += LOOK
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    @property
    def units(self) -> int:
        return int(self.seconds / UNIT)


class Diary(Store):
    """Notes when each report was sent, and how many tokens and ends were in it."""

    url: str
    clock: FakeClock
    told: list[tuple[int, int, int]]
    lost: int = 0  #: so many reports do not arrive
    cancelling: str = ""  #: a job that somebody cancels once the first report is there
    late: NewJob | None = None  #: a job that somebody puts in then
    claims: int = 0
    claims_apart: int = 0  #: in calls of their own
    watching: Sequence[str] = ()  #: jobs that somebody reads along

    def claim(self, wanted: Wanted) -> Claim:
        self.claims += 1
        self.claims_apart += 1
        return super().claim(wanted)

    def report(
        self, publications: Sequence[Publication], settlements: Sequence[Settlement], wanted: Wanted | None = None
    ) -> Reported:
        tokens = sum(len(event.token_ids) for each in publications for event in each.events)
        if tokens or settlements:
            self.told.append((self.clock.units, tokens, len(settlements)))
            if len(self.told) <= self.lost:
                raise StoreUnavailable("away")
        self.claims += wanted is not None
        reported = super().report(publications, settlements, wanted)
        if self.cancelling and len(self.told) == 1:
            self.cancel(self.cancelling)
        if self.late and len(self.told) == 1:
            self.submit(self.late)
        return dataclasses.replace(reported, watched=frozenset(self.watching))


@pytest.fixture
def diary(valkey_url: str) -> Iterator[Diary]:
    store = Diary(store_settings(valkey_url))
    store.url, store.clock, store.told = valkey_url, FakeClock(), []
    yield store
    store.close()


class Prompt(Lookout):
    """Has its answer by the next step, however short that is."""

    def jobs_wait(self, *, ask: bool) -> bool:
        found = super().jobs_wait(ask=ask)
        assert not self._asked or self._connection.can_read(5)
        return found


class SameThread(Executor):
    """Talks are held when they are begun, and heard after the step as ever."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class LastEngine(InstantEngine):
    """Tells its worker to drain once it has taken in so many jobs."""

    def __init__(self, clock: FakeClock, step_units: int, jobs: int, stop: Stop) -> None:
        super().__init__(InstantConfig(step_seconds=step_units * UNIT), sleep=clock.sleep)
        self._missing = jobs
        self._stop = stop

    def add(self, job_id: str, request: Request, emitted: tuple[Emitted, ...] = ()) -> None:
        super().add(job_id, request, emitted)
        self._missing -= 1
        if self._missing == 0:
            self._stop.request()


def work(
    store: Diary,
    *max_tokens: int,
    step_units: int = 1,
    publish_units: int = 4,
    unread_units: int = 0,
    waiting: int = 0,
) -> list[tuple[int, int, int]]:
    """Compute jobs of so many tokens, and those that wait, from one step on; when was reported, in units, and what."""
    for n, most in enumerate(max_tokens):
        store.submit(NewJob(id=f"j{n}", request=Request(prompt=f"{n}", params=SamplingParams(max_tokens=most))))
    settings, stop = WorkerSettings(engine="instant", worker_name="w1"), Stop(60)
    engine = LastEngine(store.clock, step_units, len(max_tokens) + waiting, stop)
    rq = RqWorker("w1", connect(store.url), stop.request)
    presence = Presence(WorkerCard(name="w1", host="h", pid=1, model=engine.card), store, rq, Pulse(), 0.3)
    presence.arrive()
    upkeep = Upkeep(store, divide_cores(settings, store), 60)
    pace = Pace(publish_units * UNIT, unread_units * UNIT, store.clock)
    Worker(
        engine,
        Talk(store, presence, upkeep, engine.card, Prompt(store.url, engine.card)),
        presence,
        stop,
        pace,
        SameThread(),
    ).run()
    return store.told


def test_short_steps_share_reports_that_are_publish_seconds_apart_and_the_last_goes_at_once(diary: Diary) -> None:
    assert work(diary, 20) == [(1, 1, 0), (5, 4, 0), (9, 4, 0), (13, 4, 0), (17, 4, 0), (20, 3, 1)]
    assert [len(event.fields["token_ids"]) for event in diary.events("j0")[1:-1]] == [1, 4, 4, 4, 4, 3]


def test_the_end_of_a_job_waits_for_the_next_report_while_others_are_computed(diary: Diary) -> None:
    assert work(diary, 3, 8) == [(1, 2, 0), (5, 4 + 2, 1), (8, 3, 1)]


def test_a_step_longer_than_publish_seconds_is_reported_at_once(diary: Diary) -> None:
    assert work(diary, 4, step_units=5) == [(5, 1, 0), (10, 1, 0), (15, 1, 0), (20, 1, 1)]


def test_with_publish_seconds_0_each_step_is_reported(diary: Diary) -> None:
    assert work(diary, 4, publish_units=0) == [(1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 1, 1)]


def test_beside_a_job_whose_worker_died_each_step_is_reported(diary: Diary) -> None:
    """Else a job that kills its worker gets a few tokens further at each death, and no death counts as the second."""
    card = InstantEngine().card
    diary.birth(WorkerCard(name="doomed", host="h", pid=1, model=card))
    diary.submit(NewJob(id="survivor", request=Request(prompt="x", params=SamplingParams(max_tokens=3))))
    assert [job.id for job in diary.claim(Wanted("doomed", card, 1, 0)).jobs] == ["survivor"]
    diary.expire_lease("doomed")
    told = work(diary, 9, waiting=1)

    assert told == [(1, 2, 0), (2, 2, 0), (3, 2, 1), (7, 4, 0), (9, 2, 1)]


@pytest.mark.parametrize(("step_units", "steps"), [(1, 1 + 4), (5, 2)])
def test_a_cancellation_is_heard_with_the_next_report_and_obeyed_in_the_step_behind_it(
    diary: Diary, step_units: int, steps: int
) -> None:
    diary.cancelling = "j0"
    told = work(diary, 1_000, step_units=step_units)

    assert told[-1][0] <= (steps + 2) * step_units
    assert diary.get("j0").state is JobState.CANCELLED


def test_a_report_that_did_not_arrive_is_sent_again_as_soon_as_redis_answers(diary: Diary) -> None:
    diary.lost = 1
    lost, again, last = work(diary, 8_000, publish_units=100_000)

    assert lost == (1, 1, 0)
    assert again[0] == again[1]
    assert again[0] < last[0] == 8_000


def test_a_busy_worker_that_found_no_job_hears_of_the_next_one_from_its_reports(diary: Diary) -> None:
    diary.late = NewJob(id="late", request=Request(prompt="late", params=SamplingParams(max_tokens=2)))
    told = work(diary, 40, waiting=1)

    assert diary.get("late").state is JobState.SUCCEEDED
    assert [ends for _, _, ends in told[:3]] == [0, 0, 1]  # long before the other one
    assert diary.claims <= 4


def test_a_busy_worker_with_nothing_to_report_still_asks_whether_jobs_wait(diary: Diary) -> None:
    diary.late = NewJob(id="late", request=Request(prompt="late", params=SamplingParams(max_tokens=2)))
    told = work(diary, 40, unread_units=1_000, waiting=1)

    assert diary.get("late").state is JobState.SUCCEEDED
    assert [(tokens, ends) for _, tokens, ends in told] == [(1, 0), (2, 1), (39, 1)]


def test_whether_jobs_wait_is_asked_half_a_second_after_it_was_last_told() -> None:
    clock = FakeClock()
    pace = Pace(UNIT, UNIT, clock)
    assert [pace.ask_due(), pace.ask_due()] == [True, False]
    clock.sleep(ASK_SECONDS)
    pace.hear(told=True)
    assert not pace.ask_due()
    clock.sleep(ASK_SECONDS)
    pace.hear(told=False)  # a beat alone says nothing about it
    assert pace.ask_due()


@pytest.mark.parametrize("first", ["a report of all", "a question", "what the caller knows of"])
def test_it_is_quiet_until_something_is_due_or_heard(first: str) -> None:
    clock = FakeClock()
    pace = Pace(UNIT, UNIT if first == "a report of all" else 60, clock)
    assert pace.all_due()
    assert pace.ask_due()
    assert not pace.quiet
    pace.be_quiet(2 * UNIT if first == "what the caller knows of" else 60)
    seconds = {"a report of all": UNIT, "a question": ASK_SECONDS, "what the caller knows of": 2 * UNIT}[first]
    clock.sleep(seconds - UNIT / 2)
    assert pace.quiet
    clock.sleep(UNIT / 2)
    assert not pace.quiet
    pace.be_quiet(60)
    pace.hear(told=False)
    assert not pace.quiet


def test_an_end_and_the_claim_of_what_waits_behind_it_are_one_call(diary: Diary) -> None:
    """A full engine knows from its reports that jobs wait, and takes the next one with the end that makes room."""
    told = work(diary, *[4] * 80)  # of which 32 run at once

    assert [ends for _, _, ends in told if ends] == [32, 32, 16]
    assert (diary.claims, diary.claims_apart) == (3, 0)


# -- jobs that nobody reads along


def test_of_a_job_that_nobody_reads_along_the_first_token_is_reported_at_once_and_the_rest_seldom(
    diary: Diary,
) -> None:
    assert work(diary, 20, publish_units=1, unread_units=8) == [(1, 1, 0), (8, 7, 0), (16, 8, 0), (20, 4, 1)]


def test_a_job_is_reported_promptly_from_when_a_report_said_that_somebody_reads_along(diary: Diary) -> None:
    diary.watching = ["j1"]
    told = work(diary, 20, 20, publish_units=2, unread_units=8)

    assert [tokens for _, tokens, _ in told] == [2, 2, 2, 2, 10, 2, 2, 2, 10, 2, 4]
    assert [units for units, _, _ in told] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 20]
