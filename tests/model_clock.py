"""What the house's clock does in the model test's walk: deadlines, patience, retention and schedules."""

from __future__ import annotations

from jobs import commands, keys
from jobs.job import FINAL, JobState
from tests.jobs_world import pass_deadline
from tests.model_walk import World, gone

S = JobState


def sweep(world: World) -> None:
    """The house's clock ticks until nothing is left to do; the first call knows whether there is more."""
    client, now = world.client, world.client.time()[0] * 1000
    due = [client.zcount(key, "-inf", now) for key in (keys.DEADLINES, keys.WAITS, keys.RETENTION)]
    unpacked = client.scard(keys.UNPACKED)
    _, more = world.store._runner.run(commands.expire())
    least = [number - sum(due[:i]) for i, number in enumerate(due)]  # one that ends leaves the others, too
    if max(least) >= commands.SWEEP or (unpacked and not any(due)):
        assert more, f"{due} are due, {unpacked} are not packed, and that is all"
    assert not more or any(due) or unpacked, "there is more to do, and nothing is due"
    world.store.expire()
    assert not client.scard(keys.UNPACKED), "a log that is not packed"


def expire(world: World) -> None:
    if job_id := world.any_id():
        view = world.views[job_id]
        if "deadline_at" in view.fields or view.job.state is not S.QUEUED:
            pass_deadline(world.client, job_id)
            if view.job.state is S.QUEUED and world.chance(0.5):
                return  # whoever claims it finds out
            world.client.zadd(keys.DEADLINES, {job_id: 1, "ghost": 1})  # of jobs that wait no more, perhaps
    sweep(world)
    if job_id and view.job.state is S.QUEUED and "deadline_at" in view.fields and job_id not in world.touched:
        assert world.look(job_id).job.state is S.EXPIRED


def lose_patience(world: World) -> None:
    waiting = [job_id for job_id in world.ids if "waits" in world.views[job_id].facts.places]
    for job_id in {*waiting, world.any_id() or "nobody", "ghost"}:  # the last ones wait for nobody
        world.client.zadd(keys.WAITS, {job_id: 1})
    sweep(world)
    for job_id in set(waiting) - world.touched:
        view = world.look(job_id)
        assert view.job.state is S.EXPIRED or (view.job.state, view.job.reason) == (S.FAILED, "engine_changed")
        assert job_id in world.pushed or view.job.state is S.EXPIRED or not view.facts.lists


def forget(world: World) -> None:
    over = [job_id for job_id in world.ids if world.views[job_id].job.state in FINAL and job_id not in world.by_rq]
    if len(over) > 4:
        job_id = world.random.choice(over)
        world.client.zadd(keys.RETENTION, {job_id: 1})
        if not world.views[job_id].stays and world.chance(0.3):  # Redis was quicker
            world.client.delete(f"{keys.JOB}{job_id}", f"{keys.RESULTS}{job_id}")
        world.client.zadd(keys.RETENTION, {"ghost": 1})
        world.client.sadd(keys.UNPACKED, "ghost", "spirit")
        sweep(world)
        gone(world, job_id)
    elif (waiting := world.any_id(S.QUEUED)) and not world.by_rq:
        world.client.zadd(keys.RETENTION, {waiting: 1})
        sweep(world)
        assert world.look(waiting).job.state in (S.QUEUED, S.EXPIRED)


def promote(world: World) -> None:
    due = {job_id: world.views[job_id] for job_id in world.ids if world.views[job_id].fields["status"] == "scheduled"}
    for job_id in {*due, world.any_id() or "nobody", "ghost"}:  # RQ's scheduler may leave one behind
        world.client.zadd(keys.SCHEDULED, {job_id: 1})
    full = world.client.zcount(keys.SCHEDULED, 0, 1) >= commands.SWEEP
    assert world.store._runner.run(commands.promote())[1] == full, "whether there is more to promote"
    world.store.promote()
    lists, views = world.lists(), world.look_at([*due])
    for job_id, view in due.items():
        after = views[job_id]
        assert (after.fields["status"], after.fields["enqueued_at"] > view.fields["enqueued_at"]) == ("queued", True)
        for ids in (lists[key] for key, _ in after.facts.lists if job_id not in world.pushed):
            first = after.fields.get("enqueue_at_front_on_retry") == "1"
            others = [place for place, each in enumerate(ids) if each not in due]
            assert all((ids.index(job_id) < place) == first for place in others), f"{job_id}, first: {first}, of {ids}"
