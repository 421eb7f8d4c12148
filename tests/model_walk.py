"""The model test's random walk: one act a step (``tests.model_acts``), and after each all that must hold.

Workers of two engines of one model and of another model, zombies, lost replies, duplicates, readers, a doctor and stock
RQ's own tools take part.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from rq.exceptions import InvalidJobOperation, NoSuchJobError

from core.errors import HeadraceError, JobConflict, JobNotFound
from core.request import Choice, Result, TokenEvent, TokenLogprob, Usage
from jobs import audit, commands, keys
from jobs.job import FINAL, JobState
from jobs.outbox import Callback
from jobs.scripting import Command
from jobs.store import ClaimedJob, LoggedEvent, Publication, Store
from tests.jobs_world import born
from tests.model_house import CARDS, judge_counts, judge_positions, judge_wakes, judge_workers
from tests.model_judge import IDS, View, judge_answer, judge_change, judge_job, judge_ours
from tests.model_look import Eye, House

S = JobState
JOBS = 12  #: at a time
SETTINGS: Mapping[str, Any] = {
    "durability": "memory",
    "lease_seconds": 60.0,
    "grace_seconds": 60.0,
}  #: of a walk's store


class World:
    """What the workers and readers believe, and what the jobs were when last seen."""

    def __init__(self, store: Store, seed: int) -> None:
        self.store, self.random = store, random.Random(seed)
        self.client: Any = store.connection
        self.held: dict[str, dict[str, ClaimedJob]] = {name: {} for name in CARDS}
        self.zombies: list[ClaimedJob] = []  #: what dead or swept workers still believe
        self.shown: dict[str, list[LoggedEvent]] = {}  #: what somebody outside was shown of each job's run
        self.ids: list[str] = []
        self.carried: list[Callback] = []  #: what couriers have taken, be it long ago
        self.told: set[str] = set()  #: every callback there ever was
        self.made = 0
        self.by_rq: set[str] = set()  #: ids that stock RQ moved, and nobody has looked at since
        self.unjudged: set[str] = set()  #: ids that were such when they last looked otherwise than before
        self.touched: set[str] = set()  #: ids that stock RQ ever moved
        self.pushed: set[str] = set()  #: ids that may be in a list once more, by stock RQ's doing
        self.acts: Counter[str] = Counter()
        self.views: dict[str, View] = {}
        self.small = seed % 2 == 1  #: one call of a script does little, and is to be called again
        store._runner.load()
        self._eye = Eye(store)
        self.credit = 0  #: ended jobs that are counted for the speed, and never were
        for name, card in CARDS.items():
            born(store, name, card=card)
        self._judged: tuple[House, dict[str, View]] = (self._eye.look(())[1], {})

    # -- what acts are made of

    def any_id(self, *states: JobState) -> str | None:
        found = [job_id for job_id in self.ids if not states or self.views[job_id].job.state in states]
        return self.random.choice(found) if found else None

    def any_held(self) -> tuple[str, ClaimedJob] | None:
        every = [(name, job) for name in CARDS for job in self.held[name].values()]
        return self.random.choice(every) if every else None

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def bury(self, name: str) -> None:
        self.zombies += self.held[name].values()
        self.held[name].clear()

    def touch(self, job_id: str) -> None:
        """Stock RQ moves it: its id may stay in a list, and be queued once more."""
        for each in (self.by_rq, self.touched, self.pushed):
            each.add(job_id)
        self.shown.pop(job_id, None)

    def seen(self, job_id: str) -> View:
        """The job as it was when the last act had ended."""
        if job_id not in self.views:
            raise JobNotFound(job_id)
        return self.views[job_id]

    def look(self, job_id: str) -> View:
        """The job as it is now; ``Store.get`` would mend what stock RQ left behind."""
        found = self.look_at([job_id])
        if job_id not in found:
            raise JobNotFound(job_id)
        return found[job_id]

    def look_at(self, job_ids: Sequence[str]) -> dict[str, View]:
        return self._eye.look(job_ids)[0]

    def lists(self) -> Mapping[str, Sequence[str]]:
        return self.house().lists

    def house(self) -> House:
        return self._eye.look(())[1]

    def speech(self, job: ClaimedJob, said: int, first: int, number: int) -> Publication:
        """So many events more, of several choices, some with two tokens or none, some with log-probabilities."""
        events = []
        for _ in range(number):
            ids = tuple(IDS * n for n in range(said, said + self.random.choice((1, 1, 1, 2, 0) if said else (1, 2))))
            said += len(ids)
            logprobs = tuple(TokenLogprob(token_id=each, logprob=-0.5) for each in ids) if self.chance(0.2) else None
            text = "".join(f"é{each}" for each in ids)
            index = self.random.choice((0, 0, 0, 1))
            events.append(TokenEvent(job_id=job.id, index=index, text=text, token_ids=ids, logprobs=logprobs))
        return Publication(job_id=job.id, attempt=job.attempt, first=first, events=events)

    # -- looking

    def check(self, act: str, number: int) -> None:
        """Judge what changed; now and then look after what stock RQ left behind, and for what nobody remembers."""
        from tests.model_hooks import judge_callbacks, read_records

        for job_id in sorted(self.by_rq) if number % 16 == 0 else ():
            with contextlib.suppress(JobNotFound):
                self.store.get(job_id)  # mends it: RQ knows nothing of index and log
            self.by_rq.discard(job_id)
        old, before = self._judged
        self.views, house = self._eye.look(self.ids)
        self.ids = [job_id for job_id in self.ids if job_id in self.views]
        self._judged = house, dict(self.views)
        problems = [f"{job_id}: {each}" for job_id in self.ids for each in self._judge(before.get(job_id), job_id, act)]
        problems += [*judge_workers(house, self.views, self.touched), *judge_wakes(house, self.views, self.touched)]
        problems += judge_counts(old, house, before, self.views, self.touched, self.credit)
        problems += judge_positions(old, house, before, self.views) if act != "forget" else ()
        problems += judge_callbacks(before, self, act, read_records(house.callbacks), house.outbox)
        self.credit = 0
        if number % 64 == 0:
            found = (each.split(": ", 1) for each in audit.audit(self.client))
            problems += [f"{job_id}: {each}" for job_id, each in found if not self._left_by_rq(job_id, each)]
        assert problems == [], problems

    def _judge(self, before: View | None, job_id: str, act: str) -> list[str]:
        view = self.views[job_id]
        if job_id in self.by_rq:
            self.unjudged.add(job_id)
            return []
        if view is before and job_id not in self.unjudged:
            return []
        self.unjudged.discard(job_id)
        if before and before.job.state in FINAL and view.job.state not in FINAL:
            self.shown.pop(job_id, None)  # another run
        found = [each for each in audit.judge(view.facts) if not self._left_by_rq(job_id, each)]
        found += [*judge_job(view), *judge_change(before, view, act)]
        if job_id not in self.touched:
            found += [*judge_ours(view), *judge_answer(before, view, act)]
        shown = self.shown.get(job_id)
        if shown is not None and list(view.log[: len(shown)]) != shown:
            found.append(f"a reader was shown {shown}, and now it is {view.log}")
        return found

    def _left_by_rq(self, job_id: str, problem: str) -> bool:
        """Stock RQ may put an id into the queue twice: the second falls out when it is claimed."""
        return job_id in self.pushed and ", and is in [" in problem


def answer_of(log: Sequence[LoggedEvent]) -> Result:
    """The result that a log's events make."""
    texts: dict[int, str] = {0: ""}
    for event in log:
        if event.type == "token":
            texts[event.fields["index"]] = texts.get(event.fields["index"], "") + event.fields["text"]
    choices = [Choice(index=index, text=text, finish_reason="length", token_ids=()) for index, text in texts.items()]
    return Result(usage=Usage(prompt_tokens=1, completion_tokens=1), choices=tuple(choices))


def walk(store: Store, seed: int, steps: int) -> World:
    """Take so many steps, judging each."""
    with pytest.MonkeyPatch.context() as patch:
        if seed % 2 == 1:
            patch.setattr(commands, "SWEEP", 2)
            patch.setattr(commands, "LOOKS", 2)
        world = World(store, seed)
        _take_steps(world, steps)
    return world


def _take_steps(world: World, steps: int) -> None:
    from tests.model_acts import ACTS

    acts, weights, trail = list(ACTS), list(ACTS.values()), [""]
    for number in range(steps):
        [act] = world.random.choices(acts, weights)
        trail.append(act.__name__)
        world.acts[act.__name__] += 1
        try:
            with contextlib.suppress(JobConflict, JobNotFound, NoSuchJobError, InvalidJobOperation):
                act(world)
            world.check(act.__name__, number)
        except (AssertionError, HeadraceError, LookupError, TypeError, ValueError) as error:
            raise AssertionError(f"step {number} after {trail[-6:]}: {type(error).__name__} {error}") from error


def facts_of(world: World, job_id: str) -> Any:
    """Where an id is that no job has."""
    lists = audit.queue_lists(world.client)
    [(answer, _)] = world.store._runner.run(Command("examine", [len(lists), *lists, job_id], list))
    return json.loads(answer)


def gone(world: World, job_id: str) -> None:
    """Nothing is left of a job."""
    _, _, places, index, *_ = facts_of(world, job_id)
    left = [name for name in (keys.JOB, keys.RESULTS, keys.EVENTS) if world.client.exists(f"{name}{job_id}")]
    assert (places, index, left) == ({}, {}, []), f"left of {job_id}"
