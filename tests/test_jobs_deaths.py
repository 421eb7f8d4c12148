"""What a job remembers of the workers that died with it, and what its error says when it is a dead letter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from jobs import keys
from jobs.job import JobState
from jobs.store import Store
from tests.jobs_world import add, audit, born, done, outlast_grace, say, settings, take, wipe_lease


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url, durability="memory"))
    born(store)
    yield store
    store.close()


def die(store: Store, how: str, worker: str = "w") -> None:
    """The worker claims what there is, and dies of this."""
    born(store, worker)
    take(store, worker)
    store.expire_lease(worker, how)


def hows(store: Store, job_id: str) -> list[str]:
    return [death["how"] for death in store.get(job_id).deaths]


def test_a_death_is_noted_on_each_job_the_worker_held(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    add(store, "b")
    first, _ = take(store)
    store.report([say(first, 1, 2)], [])
    now, _ = valkey.time()
    store.expire_lease("w", "signal SIGKILL")
    [said], [silent] = store.get("a").deaths, store.get("b").deaths

    assert said.pop("at") == pytest.approx(now, abs=5)
    assert said == {
        "attempt": 1, "worker": "w", "host": "h", "how": "signal SIGKILL", "tokens": 2, "neighbours": 1,
    }  # fmt: skip
    assert silent["tokens"] == 0
    assert store.get("a").to_wire()["deaths"][0]["how"] == "signal SIGKILL"
    assert audit(valkey) == []


def test_a_lease_that_ran_out_is_a_death_of_its_own_kind(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    take(store)
    wipe_lease(valkey)
    store.reap()
    outlast_grace(valkey)
    store.reap()

    assert hows(store, "a") == ["its lease ran out"]


def test_a_death_of_which_nobody_says_anything_is_noted_too(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    take(store)
    store.death("w")  # it leaves, and forgets what it holds
    store.reap()
    die(store, "")

    assert hows(store, "a") == ["it left without handing its jobs back", "its process died"]
    assert valkey.keys(f"{keys.CARD}*") == []


def test_a_job_remembers_five_deaths_at_most(store: Store) -> None:
    add(store, "a")
    for number in range(7):
        born(store)
        [job] = take(store)
        store.report([say(job, number)], [])
        store.expire_lease("w", f"death {number}")

    assert hows(store, "a") == [f"death {number}" for number in range(2, 7)]
    assert [death["tokens"] for death in store.get("a").deaths] == [3, 4, 5, 6, 7]


def test_the_error_of_a_dead_letter_says_how_its_workers_died(store: Store) -> None:
    add(store, "poison")
    add(store, "neighbour")
    die(store, "signal SIGKILL")
    born(store, "v")
    assert [job.id for job in take(store, "v", room=1)] == ["poison"]
    store.expire_lease("v", "no sign of life for 30 s")
    die(store, "x" * 10_000)
    error = store.get("poison").error or {}

    assert store.get("poison").state is JobState.FAILED
    assert error["code"] == "poison_job"
    assert error["param"] is None
    assert error["message"] == (
        "the job was running each time its worker died: signal SIGKILL at 0 tokens, beside 1; "
        f"no sign of life for 30 s at 0 tokens, alone; {'x' * 120} at 0 tokens, alone"
    )


def test_a_retry_keeps_the_record_and_success_drops_it(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    for _ in range(3):
        die(store, "signal SIGKILL")
    store.retry("a")
    assert hows(store, "a") == ["signal SIGKILL"] * 3
    born(store)
    [job] = take(store)
    store.report([say(job, 1)], [done(job)])

    assert store.get("a").deaths == ()
    assert valkey.hexists(f"{keys.JOB}a", "deaths") == 0


def test_a_worker_that_is_swept_in_steps_held_as_many_for_all_its_jobs(store: Store) -> None:
    ids = [add(store).id for _ in range(700)]
    assert len(take(store, room=1000)) + len(take(store, room=1000)) == 700
    store.expire_lease("w", "signal SIGKILL")
    found = {(death["neighbours"], death["how"]) for job_id in ids for death in store.get(job_id).deaths}

    assert found == {(699, "signal SIGKILL")}
