"""What goes wrong in the model test's walk: workers die, jobs lose their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jobs import audit, commands, keys, rows
from jobs.job import FINAL, Job, JobState
from jobs.reports import WorkerCard
from jobs.scripting import Command
from jobs.work import Beat, ReapReport
from tests.jobs_world import born, outlast_grace, wipe_lease
from tests.model_house import CARDS
from tests.model_judge import View
from tests.model_walk import World, facts_of

S = JobState
Hurt = list[list[object]]  #: commands

# -- workers


def die(world: World) -> None:
    name = world.random.choice(list(CARDS))
    running = [world.views[job_id] for job_id in world.ids if world.views[job_id].job.state is S.RUNNING]
    mute = [view.job for view in running if not view.spoke]
    if mute and world.chance(0.8):  # so that there are suspects
        name = max(mute, key=lambda job: job.crashes).worker or name
    _bury(world, name, "it fell", lambda: _sweep(world, name, "it fell"))


def fall_silent(world: World) -> None:
    name = world.random.choice(list(CARDS))
    wipe_lease(world.client, name)
    assert (world.store.reap().workers, world.store.reap().workers) == ((), ()), "swept before the grace"
    assert world.client.zscore(keys.MARKS, name), "nobody saw that its lease ran out"
    if world.chance(0.5):
        outlast_grace(world.client, name)
        _bury(world, name, "its lease ran out", lambda: _sweep(world, name))
    elif world.chance(0.5):
        born(world.store, name, card=CARDS[name])
    else:  # it was only slow
        held = {job.id: job.attempt for job in world.held[name].values()}
        for job_id in world.store.renew(name, "busy", held, {}).lost:
            world.zombies.append(world.held[name].pop(job_id))


def leave(world: World) -> None:
    """A worker goes, having handed its jobs back, or most of them; perhaps its lease had run out."""
    name = world.random.choice(list(CARDS))
    if world.chance(0.3):
        wipe_lease(world.client, name)
        world.store.reap()
    if world.chance(0.3):
        world.client.set(keys.HOLD, name)
    world.store.release([(job.id, job.attempt) for job in world.held[name].values() if world.chance(0.5)])
    left = world.client.scard(f"{keys.HELD}{name}")
    world.store.death(name)
    if left:
        assert world.client.zscore(keys.LEASES, name) == 0, "nobody will sweep what it holds"
        _bury(world, name, "it left without handing its jobs back", lambda: _sweep(world, name))
    else:
        world.bury(name)
        _vanished(world, name)


def _bury(world: World, name: str, how: str, sweep: Callable[[], ReapReport]) -> None:
    """A worker dies; what it ran goes on, or ends where it must."""
    if world.client.scard(f"{keys.HELD}{name}") and world.chance(0.3):
        world.client.sadd(f"{keys.HELD}{name}", "ghost:1")
    other = world.random.choice([name, *CARDS])
    world.client.set(keys.HOLD, other)
    held = {member.decode() for member in world.client.smembers(f"{keys.HELD}{name}")}
    running = [view for view in world.look_at(world.ids).values() if view.job.state is S.RUNNING]
    mine = [view for view in running if f"{view.job.id}:{view.job.attempt}" in held]
    began = {view.job.id: _began(world, view) for view in mine}
    world.bury(name)
    for key in (keys.RQ_WORKERS, keys.QUEUE_WORKERS):
        world.client.sadd(key, f"{keys.RQ_WORKER}{name}")
    report = sweep()
    assert name in report.workers
    registered = (keys.RQ_WORKERS, keys.QUEUE_WORKERS, f"{keys.RQ_WORKER}{name}")
    assert not world.client.exists(*registered), f"{name} is RQ's worker still"
    assert world.client.exists(keys.HOLD) == (other != name), "it holds still, or took another's hold"
    world.client.delete(keys.HOLD)
    if not world.small:
        _in_order(world, {job_id: when for job_id, when in began.items() if job_id not in world.pushed})
    dead = {view.job.id for view in mine if not view.job.cancel_requested and _crashes(view) >= 3}
    cancelled = sum(view.job.cancel_requested for view in mine)
    if not world.by_rq:
        found = ({*report.dead}, report.ended, report.requeued)
        assert found == (dead, cancelled, len(mine) - cancelled - len(dead)), f"{found} of {[*began]}"
    views = world.look_at([view.job.id for view in mine])
    for view in mine:
        if view.job.id in world.by_rq:
            continue
        after, crashes = views[view.job.id].job, _crashes(view)
        state = S.CANCELLED if view.job.cancel_requested else S.FAILED if crashes >= 3 else S.QUEUED
        assert (after.state, after.crashes) == (state, crashes), (
            f"{view.job.id}: {after.state}, {after.crashes} crashes"
        )
        if state is S.FAILED:
            assert (after.reason, (after.error or {})["message"]) == ("poison_job", _words(after))
        death = after.deaths[-1]
        told = (death["attempt"], death["how"], death["tokens"], death["neighbours"])
        assert told == (view.job.attempt, how, view.number("tokens"), len(held) - 1)
        assert len(after.deaths) == min(5, len(view.job.deaths) + 1)
    _vanished(world, name)


def _sweep(world: World, name: str, how: str = "") -> ReapReport:
    """Take its jobs, in as many calls as it takes: the first one knows whether there is more."""
    held = world.client.scard(f"{keys.HELD}{name}")
    first, more = world.store._runner.run(commands.reap(world.store._settings, name if how else "", how))
    assert more == (held >= commands.SWEEP), f"held {held}, and there is more: {more}"
    rest = world.store.expire_lease(name, how) if more and how else world.store.reap()
    return ReapReport(
        requeued=first.requeued + rest.requeued,
        ended=first.ended + rest.ended,
        dead=first.dead + rest.dead,
        workers=first.workers + rest.workers,
    )


def _crashes(view: View) -> int:
    """What its worker's death makes of a job's crashes."""
    return 1 if view.spoke else view.job.crashes + 1


def _words(job: Job) -> str:
    """The error of a dead letter."""
    told = []
    for death in job.deaths[-3:]:
        beside = f"beside {death['neighbours']}" if death["neighbours"] else "alone"
        told.append(f"{death['how']} at {death['tokens']} tokens, {beside}")
    return f"the job was running each time its worker died: {'; '.join(told)}"


def _began(world: World, view: View) -> tuple[str, float, str]:
    """Which of the jobs of a dead worker goes first: by claim, by creation, by name."""
    at = world.client.hget(f"{keys.EXECUTION}{view.job.id}:{view.job.attempt}", "created_at")
    return (at or b"0").decode(), view.kept.born, view.job.id


def _in_order(world: World, began: Mapping[str, tuple[str, float, str]]) -> None:
    """What goes on stands in the order in which it was claimed."""
    for key, ids in world.lists().items():
        found = [began[job_id] for job_id in ids if job_id in began]
        right = sorted(found, reverse=key.startswith(keys.SUSPECTS))
        assert found == right, f"reaped into {key}: {found}"


def _vanished(world: World, name: str) -> None:
    """Nothing is left of the worker; another takes its name."""
    assert name not in [card.name for card in world.store.workers()]
    assert not world.client.exists(f"{keys.CARD}{name}", f"{keys.HELD}{name}")
    assert world.client.zscore(keys.LEASES, name) is world.client.zscore(keys.MARKS, name) is None
    assert world.client.get(keys.HOLD) != name.encode()
    if world.chance(0.5):
        world.client.hset(f"{keys.RQ_WORKER}{name}", "birth", 1)
    if world.chance(0.2):  # it was only asleep
        world.store._card = None
        world.store._runner.run(_beat(world, name))
    else:
        born(world.store, name, card=CARDS[name])
    [card] = [card for card in world.store.workers() if card.name == name]
    assert (card.model, card.host, card.started_at > 0) == (CARDS[name], "h", True)
    assert {card.name for card in world.store.known()} == {card.name for card in CARDS.values()}


def _beat(world: World, name: str) -> Command[Beat]:
    card = WorkerCard(name=name, host="h", pid=1, model=CARDS[name])
    return commands.renew(name, "busy", {}, {}, rows.pack_card(card), world.store._settings)


# -- places


def mend(world: World) -> None:
    """A doctor looks at a job that is well, or that lost its place: it keeps its state, and is well."""
    rare = [
        job_id for job_id, view in world.views.items()
        if view.fields["status"] == "scheduled" or view.job.reason == "poison_job"
    ]  # fmt: skip
    job_id = world.random.choice(rare) if rare and world.chance(0.3) else world.any_id()
    if not job_id or job_id in world.touched:
        return
    before = world.views[job_id]
    hurt = world.random.choice([each for each in HURTS if each(world, job_id)])
    if job_id in rare and world.chance(0.5) and _lose_registry(world, job_id):
        hurt = _lose_registry
    for command in hurt(world, job_id):
        world.client.execute_command(*command)
    audit.mend(world.client, job_id)
    after = world.look(job_id)
    lost = before.job.state is S.RUNNING and hurt in (_lose_execution, _lose_worker)
    state = before.job.state if not lost else S.CANCELLED if before.job.cancel_requested else S.QUEUED
    assert after.job.state is state, f"{before.job.state} -> {after.job.state} by {hurt.__name__}"
    assert lost or after.fields["status"] == before.fields["status"]
    assert state is S.CANCELLED or after.log == before.log
    assert hurt is _lose_index or after.kept.born == before.kept.born
    assert hurt is _lose_registry or lost or after.fields.get("expires_at") == before.fields.get("expires_at")
    assert not after.facts.lists or state is S.QUEUED, f"left in {after.facts.lists}"
    assert sum(times for _, times in after.facts.lists) <= 1
    world.pushed.discard(job_id)


def _lose_list(world: World, job_id: str) -> Hurt:
    return [["LREM", key, 0, job_id] for key in audit.queue_lists(world.client)]


def _gain_lists(world: World, job_id: str) -> Hurt:
    return [["RPUSH", keys.READY, job_id], ["RPUSH", keys.SUSPECTS, job_id]]


def _lose_index(world: World, job_id: str) -> Hurt:
    job = world.views[job_id].job
    right = f"{keys.INDEX}{job.kind}:{job.state}"
    wrong: Hurt = [["ZADD", f"{keys.INDEX}{job.kind}:{each}", 1, job_id] for each in S if each is not job.state]
    return [*wrong, ["ZREM", right, job_id], ["HSET", f"{keys.JOB}{job_id}", "place", "nowhere"]]


def _gain_places(world: World, job_id: str) -> Hurt:
    view = world.views[job_id]
    places = [keys.SCHEDULED, keys.DEFERRED] if view.fields["status"] == "queued" else []
    if view.job.state in FINAL:
        places = [keys.SCHEDULED, keys.DEFERRED, keys.DEADLINES, keys.WAITS]
    return [["ZADD", key, 9e12, job_id] for key in places]


def _lose_registry(world: World, job_id: str) -> Hurt:
    view = world.views[job_id]
    if view.job.state not in FINAL:
        return []
    own = audit.REGISTRIES[view.fields["status"]]
    found: Hurt = [["PERSIST", f"{keys.JOB}{job_id}"], ["ZREM", keys.RETENTION, job_id], ["ZREM", keys.DEAD, job_id]]
    for name, key in (("finished", keys.FINISHED), ("failed", keys.FAILED), ("canceled", keys.CANCELED)):
        found.append(["ZREM", key, job_id] if name == own else ["ZADD", key, 9e12, job_id])
    return found


def _lose_execution(world: World, job_id: str) -> Hurt:
    job = world.views[job_id].job
    return [["DEL", f"{keys.EXECUTION}{job_id}:{job.attempt}"]] if job.state is S.RUNNING else []


def _lose_worker(world: World, job_id: str) -> Hurt:
    """It has not been there for long."""
    job = world.views[job_id].job
    member = f"{job_id}:{job.attempt}"
    if job.state is not S.RUNNING:
        return []
    here, there = f"{keys.HELD}{job.worker}", f"{keys.HELD}gone"
    return [["HSET", f"{keys.EXECUTION}{member}", "worker_name", "gone"], ["SMOVE", here, there, member]]


def _lose_progress(world: World, job_id: str) -> Hurt:
    job = world.views[job_id].job
    member = f"{job_id}:{job.attempt}"
    if job.state is not S.RUNNING:
        return [["ZADD", keys.WIP, 9e9, member], ["HSET", f"{keys.EXECUTION}{member}", "worker_name", "w"]]
    return [["ZREM", keys.WIP, member], ["SREM", f"{keys.HELD}{job.worker}", member]]


def _lose_callback(world: World, job_id: str) -> Hurt:
    fields = world.views[job_id].fields
    if "callback" not in fields:
        return []
    return [["ZREM", keys.OUTBOX, fields["callback"]], ["DEL", f"{keys.CALLBACK}{fields['callback']}"]]


def _move_callback(world: World, job_id: str) -> Hurt:
    view = world.views[job_id]
    if "callback" not in view.fields:
        return []
    over = view.facts.callback["state"] != "pending"
    name = view.fields["callback"]
    return [["ZADD", keys.OUTBOX, 1, name] if over else ["ZREM", keys.OUTBOX, name]]


HURTS = (
    *(_lose_list, _gain_lists, _lose_index, _gain_places, _lose_registry),
    *(_lose_execution, _lose_worker, _lose_progress, _lose_callback, _move_callback),
)


def mend_nobody(world: World) -> None:
    """What is left of a job that is not there any more is swept up."""
    for key in (keys.FINISHED, keys.RETENTION, keys.DEAD, keys.WAITS, keys.DEADLINES, keys.SCHEDULED):
        world.client.zadd(key, {"ghost": 9e12})
    world.client.zadd(f"{keys.INDEX}predict:failed", {"ghost": 1})
    world.client.zadd(keys.WIP, {"ghost:3": 9e12})
    world.client.hset(f"{keys.EXECUTION}ghost:3", mapping={"worker_name": "w"})
    world.client.sadd(f"{keys.HELD}w", "ghost:3")
    world.client.rpush(keys.SUSPECTS, "ghost")
    audit.mend(world.client, "ghost")
    assert [*map(len, facts_of(world, "ghost")[1:5])] == [0, 0, 0, 0]
    assert not world.client.sismember(f"{keys.HELD}w", "ghost:3")
