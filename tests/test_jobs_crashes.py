"""What the death of a worker does: who goes on, who is a suspect, who is a dead letter; innocents never are."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
import redis

from jobs import keys
from jobs.job import JobState
from jobs.store import ClaimedJob, Store, Wanted
from tests.jobs_world import (
    OTHER,
    add,
    audit,
    born,
    claim,
    done,
    kill,
    outlast_grace,
    said,
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
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    yield store
    store.close()


def crash(store: Store, times: int = 1) -> None:
    """Claim everything there is and die without a word, so often."""
    for _ in range(times):
        born(store)
        take(store)
        kill(store)
    born(store)


def make_old(client: redis.Redis, job_id: str) -> None:
    """The suspect has waited for an hour."""
    client.hincrby(f"rq:job:{job_id}", "suspect_at", -3_600_000)


def test_the_jobs_of_a_dead_process_go_on_at_once_at_the_front_in_their_order(
    store: Store, valkey: redis.Redis
) -> None:
    born(store, "v")
    ids = [add(store, job_id).id for job_id in ("m", "z", "a", "k")]
    taken = take(store, room=3)
    store.report([say(job, 1) for job in taken], [])
    report = store.expire_lease("w")

    assert (report.requeued, report.dead, report.workers) == (3, (), ("w",))
    again = take(store, worker="v")
    assert [job.id for job in again] == ids
    assert [job.crashes for job in again] == [1, 1, 1, 0]
    assert store.expire_lease("w").requeued == 0
    assert [card.name for card in store.workers()] == ["v"]
    assert audit(valkey) == []


def test_a_silent_worker_is_marked_first_and_swept_after_the_grace(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    take(store)
    assert store.reap().requeued == 0  # the lease holds
    wipe_lease(valkey)
    assert store.reap().requeued == 0  # marked
    assert store.reap().requeued == 0  # the grace has begun
    outlast_grace(valkey)

    assert store.reap().requeued == 1
    assert valkey.zcard(keys.LEASES) == valkey.zcard(keys.MARKS) == 0
    assert audit(valkey) == []


def test_real_time_takes_lease_and_grace(valkey_url: str) -> None:
    store = Store(settings(valkey_url, lease_seconds=0.1, grace_seconds=0.1, durability="memory"))
    born(store)
    add(store, "a")
    take(store)
    while not store.reap().requeued:
        store.wait(0.02)
    job = store.get("a")

    assert job.started_at is not None
    assert store.connection.time()[0] + 1 - job.started_at >= 0.2
    store.close()


def test_jobs_are_reaped_after_rq_forgot_the_worker(store: Store, valkey: redis.Redis) -> None:
    """RQ lets all keys of a worker expire: after eight minutes without any worker they are gone."""
    add(store, "a")
    take(store)
    valkey.delete("rq:worker:w", "rq:worker:w:executions", "rq:workers")
    kill(store)

    assert store.get("a").state is S.QUEUED


def test_a_worker_with_many_jobs_is_swept_in_bounded_steps(store: Store, valkey: redis.Redis) -> None:
    ids = [add(store).id for _ in range(700)]
    assert len(take(store, room=1000)) + len(take(store, room=1000)) == 700
    report = store.expire_lease("w")

    assert (report.requeued, report.workers) == (700, ("w",))
    assert valkey.llen(keys.READY) == 700
    assert store.queue().running == 0
    assert sorted(map(str, valkey.lrange(keys.READY, 0, -1))) == sorted(str(job_id.encode()) for job_id in ids)


# -- the crash rule


def test_crashes_count_up_only_while_attempts_publish_nothing(store: Store) -> None:
    add(store, "a")
    seen = []
    for token_ids in [(), (1,), (2,), ()]:
        born(store)
        [job] = take(store)
        seen.append(job.crashes)
        if token_ids:
            store.report([say(job, *token_ids)], [])
        kill(store)

    assert seen == [0, 1, 1, 1]
    assert store.get("a").crashes == 2


def test_a_job_that_kills_three_times_before_its_first_token_is_a_dead_letter(
    store: Store, valkey: redis.Redis
) -> None:
    add(store, "poison")
    crash(store, 3)
    job = store.get("poison")

    assert (job.state, job.reason, job.crashes, job.attempt) == (S.FAILED, "poison_job", 3, 3)
    assert job.error is not None
    assert job.error["code"] == "poison_job"
    assert types(store.events("poison")) == "sssf"
    assert valkey.zscore(keys.FAILED, "poison") is not None
    assert audit(valkey) == []


def test_a_suspect_starts_alone_in_an_empty_worker_before_anything_else(store: Store, valkey: redis.Redis) -> None:
    add(store, "suspect")
    crash(store, 2)
    add(store, "next")
    assert valkey.lrange(keys.SUSPECTS, 0, -1) == [b"suspect"]
    assert store.queue().suspects == 1

    got = claim(store)
    assert ([job.id for job in got.jobs], got.alone) == (["suspect"], True)
    assert [job.id for job in take(store, running=1)] == ["next"]


def test_a_busy_worker_is_told_to_empty_itself_once_a_suspect_has_waited(store: Store, valkey: redis.Redis) -> None:
    born(store, "v")
    add(store, "suspect")
    crash(store, 2)
    add(store, "one")
    early = claim(store, running=3, room=1)
    make_old(valkey, "suspect")
    add(store, "two")
    told, repeated, other = claim(store, running=3), claim(store, running=3), claim(store, worker="v", running=3)
    alone = claim(store)

    assert ([job.id for job in early.jobs], early.hold) == (["one"], False)
    assert (told.hold, told.jobs) == (True, ())
    assert repeated.hold  # the same worker, asking again
    assert ([job.id for job in other.jobs], other.hold) == (["two"], False)
    assert [job.id for job in alone.jobs] == ["suspect"]
    assert valkey.exists(keys.HOLD) == 0


def test_the_hold_of_a_worker_that_died_is_free_for_another(store: Store, valkey: redis.Redis) -> None:
    born(store, "v")
    add(store, "suspect")
    crash(store, 2)
    make_old(valkey, "suspect")
    assert claim(store, running=1).hold
    kill(store)

    assert claim(store, worker="v", running=1).hold


def test_a_suspect_that_names_another_model_is_in_nobody_s_way(store: Store, valkey: redis.Redis) -> None:
    born(store, "o", card=OTHER)
    add(store, "suspect", model="other")
    for _ in range(2):
        take(store, worker="o", card=OTHER)
        kill(store, "o")
        born(store, "o", card=OTHER)
    make_old(valkey, "suspect")
    add(store, "next")
    valkey.delete(keys.WAKE)

    assert store.queue().suspects == 1
    assert [job.id for job in take(store)] == ["next"]
    assert valkey.llen(keys.WAKE) == 0  # an idle worker that cannot help is not woken by what it left alone
    assert store.claim(Wanted("o", OTHER, 1, 3)).hold
    got = store.claim(Wanted("o", OTHER, 1, 0))
    assert ([job.id for job in got.jobs], got.alone) == (["suspect"], True)
    assert audit(valkey) == []


def test_a_cancelled_suspect_falls_out(store: Store, valkey: redis.Redis) -> None:
    add(store, "suspect")
    crash(store, 2)
    store.cancel("suspect")
    add(store, "next")

    assert [job.id for job in take(store)] == ["next"]
    assert audit(valkey) == []


@pytest.mark.parametrize("way", ["retry", "rq"])
def test_a_dead_letter_comes_back_as_a_suspect_with_one_more_chance(
    store: Store, valkey: redis.Redis, way: str
) -> None:
    from rq.registry import FailedJobRegistry
    from rq.serializers import JSONSerializer

    add(store, "poison")
    crash(store, 3)
    if way == "retry":
        store.retry("poison")
        assert valkey.lrange(keys.SUSPECTS, 0, -1) == [b"poison"]
    else:
        FailedJobRegistry("generate", connection=valkey, serializer=JSONSerializer).requeue("poison")
        assert store.get("poison").state is S.QUEUED
        assert take(store) == []  # found in the ordinary queue: now it is among the suspects
    got = claim(store)

    assert (got.alone, got.jobs[0].id, got.jobs[0].attempt) == (True, "poison", 4)
    running = store.get("poison")
    assert (running.state, running.error, running.reason, running.finished_at) == (S.RUNNING, None, None, None)
    assert audit(valkey) == []
    kill(store)
    assert store.get("poison").state is S.FAILED
    assert audit(valkey) == []


def test_a_dead_letter_that_behaves_ends_like_any_job(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    crash(store, 3)
    store.retry("a")
    [job] = take(store)
    store.report([say(job, 1)], [done(job)])

    assert store.get("a").state is S.SUCCEEDED
    assert text_of(store.events("a")) == "w1 "
    assert audit(valkey) == []


# -- innocents


class Simulation:
    """Workers that step, die at random or of poison, and are reaped at once."""

    STEPS = 5  #: tokens of a job

    def __init__(self, store: Store, seed: int, names: list[str]) -> None:
        self.store = store
        self.random = random.Random(seed)
        self.running: dict[str, dict[str, ClaimedJob]] = {name: {} for name in names}
        self.said: dict[str, int] = {}
        self.alone: dict[str, bool] = dict.fromkeys(names, False)
        self.kills = 0
        self.longest = 0

    def turn(self, name: str) -> None:
        """One round of one worker's loop: claim, step, report. A poison job kills it when it steps."""
        mine = self.running[name]
        if not self.alone[name]:
            got = claim(self.store, worker=name, room=8 - len(mine), running=len(mine))
            self.alone[name] = got.alone
            for job in got.jobs:
                mine[job.id] = job
                self.said[job.id] = len(said(self.store, job.id))
        poisoned = any(job_id.startswith("poison") for job_id in mine)
        # A kill may hit anybody at any time, but for the one moment that looks exactly like poison: a suspect, alone,
        # before its first token.
        killed = self.random.random() < 0.08 and not self.alone[name]
        if poisoned or killed:
            return self.die(name)
        for job in list(mine.values()):
            self.step(name, job)
        return self.die(name) if self.random.random() < 0.08 else None

    def step(self, name: str, job: ClaimedJob) -> None:
        number = self.said[job.id]
        self.store.report([say(job, number, first=job.next_event)], [])
        self.said[job.id] = number + 1
        self.running[name][job.id] = advanced(job)
        self.alone[name] = False
        if number + 1 == self.STEPS:
            del self.running[name][job.id]
            self.store.report([], [done(job)])

    def die(self, name: str) -> None:
        self.kills += 1
        self.running[name] = {}
        self.alone[name] = False
        kill(self.store, name)
        born(self.store, name)


def advanced(job: ClaimedJob) -> ClaimedJob:
    return dataclasses.replace(job, next_event=job.next_event + 1)


@pytest.mark.parametrize("seed", range(6))
def test_poison_dies_and_no_innocent_neighbour_does(store: Store, valkey: redis.Redis, seed: int) -> None:
    world = Simulation(store, seed, ["w", "v", "u"])
    born(store, "w", "v", "u")
    for number in range(40):
        add(store, f"poison{number}" if number % 20 == 7 else f"good{number}")
    for _ in range(400):
        if not (store.queue().queued + store.queue().running):
            break
        world.turn(world.random.choice(list(world.running)))

    jobs = store.list(limit=100)
    assert {job.id for job in jobs if job.state is S.FAILED} == {"poison7", "poison27"}
    assert all(job.state is S.SUCCEEDED for job in jobs if job.id.startswith("good"))
    assert all(job.attempt == 3 for job in jobs if job.id.startswith("poison"))
    for job in jobs:
        if job.id.startswith("good"):
            assert text_of(store.events(job.id)) == "w0 w1 w2 w3 w4 "
    assert world.kills > 6
    assert audit(valkey) == []
