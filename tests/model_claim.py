"""How workers come by jobs in the model test: claims, suspects, and what holds a claim up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.request import Request
from jobs import keys
from jobs.job import JobState, Resume
from tests.model_house import CARDS
from tests.model_walk import World

S = JobState


def claim(world: World) -> None:
    name, room, before = world.random.choice("wwvuuuo"), world.random.choice((0, 1, 2, 4)), world.lists()
    card, mine = CARDS[name], world.held[name]
    hold = _must_hold(world, name, before)
    got = world.store.claim(name, card, room, len(mine))
    assert room == 0 or hold in (None, got.hold), f"hold: {got.hold}"
    if got.alone:
        assert (len(got.jobs), len(mine), world.client.exists(keys.HOLD)) == (1, 0, 0)
    assert len(got.jobs) <= room
    assert not got.more or (world.small and len(got.jobs) < room)
    for job in got.jobs:
        view, last = world.look(job.id), world.views[job.id].job.attempt
        assert (view.job.state, view.job.worker, view.job.attempt) == (S.RUNNING, name, job.attempt)
        assert job.attempt == last + 1, f"{job.id}: claimed without raising the fence by one"
        assert job.crashes < 2 or got.alone, f"{job.id}: a suspect beside others"
        if not isinstance(job.request, Request):
            assert view.fields["model"] == "nobody's", f"{job.id} of {view.fields.get('model')}: {job.request}"
        else:
            assert (view.fields["kind"], view.fields.get("model", "")) == (job.request.kind, job.request.model or "")
            assert view.fields.get("model", "").lower() in ("", card.name), f"{job.id}: claimed by another model"
        assert job.next_event == view.log[-1].number + 1
        assert view.log[-1].fields["engine"]["dtype"] == card.dtype
        assert not view.drawn or view.job.resume is Resume.ANY or view.fields["engine"] == card.identity
        assert (job.deadline_in_seconds or 1) > 0, f"{job.id}: too late, and claimed"
    routed = {*before[keys.READY]} & world.touched  # perhaps: it was taken, and given to another model
    if len(got.jobs) < room and not (got.alone or got.hold or got.more or routed):
        after = world.lists()
        for key in (f"{keys.LIKE}{card.identity}", f"{keys.MODEL_READY}{card.name}", keys.READY):
            assert not after.get(key), f"{name} left {after[key]} in {key}"
    for ids in before.values():
        places = [ids.index(job.id) for job in got.jobs if job.id in ids and job.id not in world.pushed]
        assert places == sorted(places), f"{got.jobs} out of {ids}"
    if world.chance(0.8):  # else the reply is lost, and the next beat tells
        mine.update({job.id: job for job in got.jobs})


def _must_hold(world: World, name: str, lists: Mapping[str, Sequence[str]]) -> bool | None:
    """Whether a busy worker is to empty itself for a suspect that has waited for two seconds; None: nobody knows."""
    card, ages = CARDS[name], []
    if not world.held[name] or world.client.get(keys.HOLD) not in (None, name.encode()):
        return False
    for key in (f"{keys.LIKE_SUSPECTS}{card.identity}", f"{keys.SUSPECTS}.{card.name}", keys.SUSPECTS):
        view = world.views.get((lists.get(key) or [""])[0])
        if view and view.job.state is S.QUEUED:
            ages.append(world.client.time()[0] * 1000 - view.number("suspect_at"))
    return True if any(age > 3_000 for age in ages) else False if all(age < 0 for age in ages) else None


def suspend(world: World) -> None:
    """``rq suspend`` holds, and then somebody without a lease asks."""
    name = world.random.choice(list(CARDS))
    held = {job.id: job.attempt for job in world.held[name].values()}
    world.client.set(keys.SUSPENDED, 1)
    try:
        assert world.store.claim(name, CARDS[name], 4, 0).jobs == ()
        assert world.store.renew(name, "busy", held, {}).suspended
    finally:
        world.client.delete(keys.SUSPENDED)
    assert world.store.claim("nobody", CARDS[name], 4, 0).jobs == (), "without a lease"


def suspects_wait(world: World) -> None:
    for key, ids in world.lists().items():
        for job_id in ids if key.startswith(keys.SUSPECTS) else ():
            if job_id in world.ids and world.views[job_id].job.state is S.QUEUED:
                world.client.hset(f"{keys.JOB}{job_id}", "suspect_at", 1)
