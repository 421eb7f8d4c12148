"""How workers come by jobs in the model test: claims, suspects, and what holds a claim up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.request import Request
from jobs import keys
from jobs.job import JobState, Resume
from jobs.store import ClaimedJob, Wanted
from tests.jobs_world import list_of
from tests.model_house import CARDS
from tests.model_judge import View
from tests.model_walk import World

S = JobState


def claim(world: World) -> None:
    """Somebody claims: rather one that would compute otherwise than whoever began what waits."""
    names = [*"wwvuuuo"]
    begun = {view.fields.get("engine") for view in world.views.values() if view.job.state is S.QUEUED and view.drawn}
    if begun and world.chance(0.6):
        names = [name for name in "wvuuo" if {CARDS[name].identity} != begun]
    claim_as(world, world.random.choice(names), world.random.choice((0, 1, 1, 2, 4, 4)))


def claim_as(world: World, name: str, room: int) -> None:
    before, card, mine = world.lists(), CARDS[name], world.held[name]
    hold = _must_hold(world, name, before)
    got = world.store.claim(Wanted(name, card, room, len(mine)))
    assert room == 0 or hold in (None, got.hold), f"hold: {got.hold}"
    if got.alone:
        assert (len(got.jobs), len(mine), world.client.exists(keys.HOLD)) == (1, 0, 0)
    assert len(got.jobs) <= room
    assert not got.more or (world.small and len(got.jobs) < room)
    views = world.look_at([job.id for job in got.jobs])
    for job in got.jobs:
        view, last = views[job.id], world.views[job.id].job.attempt
        assert (view.job.state, view.job.worker, view.job.attempt) == (S.RUNNING, name, job.attempt)
        assert job.attempt == last + 1, f"{job.id}: claimed without raising the fence by one"
        assert job.crashes < 2 or got.alone, f"{job.id}: a suspect beside others"
        if not isinstance(job.request, Request):
            assert view.fields["model"] == "nobody's", f"{job.id} of {view.fields.get('model')}: {job.request}"
        else:
            assert (view.fields["kind"], view.fields.get("model", "")) == (job.request.kind, job.request.model or "")
            assert view.fields.get("model", "").lower() in ("", card.name), f"{job.id}: claimed by another model"
            assert view.job.priority == job.request.priority
        assert job.next_event == view.log[-1].number + 1
        assert view.log[-1].fields["engine"]["dtype"] == card.dtype
        assert not view.drawn or view.job.resume is Resume.ANY or view.fields["engine"] == card.identity
        assert (job.deadline_in_seconds or 1) > 0, f"{job.id}: too late, and claimed"
    routed = {*before[keys.READY]} & world.touched  # perhaps: to another class, or it was taken, and to another model
    after = world.lists()
    if room and mine and not got.hold:
        for key in _suspects(name):
            assert _waits(world, before, key) or not before.get(key) or after[key] != before[key], (
                f"{key} has a stale head"
            )
    if len(got.jobs) < room and not (got.alone or got.hold or got.more or routed):
        for key in (f"{keys.LIKE}{card.identity}", *(key for lists in _classes(card.name) for key in lists)):
            assert not after.get(key), f"{name} left {after[key]} in {key}"
        if not world.by_rq and all(view.job.state is not S.QUEUED for view in world.look_at(world.ids).values()):
            for end in ("", ":urgent", ":low"):
                counts = world.client.mget(keys.TICKETS + end, keys.PASSED + end)
                tickets, passed = (int(number or 0) for number in counts)
                assert tickets == passed, f"nobody waits, and {passed} of {tickets} passed{end}"
    begun = {*before.get(f"{keys.LIKE}{card.identity}", ())}
    if not got.alone:
        _go_in_their_order(world, [job for job in got.jobs if job.id not in begun], after, card.name)
    for ids in before.values():
        places = [ids.index(job.id) for job in got.jobs if job.id in ids and job.id not in world.pushed]
        assert places == sorted(places), f"{got.jobs} out of {ids}"
    if world.chance(0.8):  # else the reply is lost, and the next beat tells
        mine.update({job.id: job for job in got.jobs})


def _classes(model: str) -> list[tuple[str, str]]:
    """The lists of each class that a model's workers look into, the most urgent first."""
    return [(f"{key}.{model}", key) for key in map(list_of, (-1, 0, 1))]


def _go_in_their_order(world: World, jobs: list[ClaimedJob], left: Mapping[str, Sequence[str]], model: str) -> None:
    """Of so few jobs one at most is claimed while a more urgent one stays behind."""
    for number, lists in enumerate(_classes(model)):
        behind = {job_id for key in lists for job_id in left.get(key, ())} - world.pushed
        less = [list_of(priority) for priority in (0, 1)][number:]
        early = [job.id for job in jobs if list_of(world.look(job.id).job.priority) in less]
        early = [job_id for job_id in early if job_id not in world.touched]  # stock RQ chose its list
        assert not behind or len(early) <= 1, f"{early} before {behind}"


def _must_hold(world: World, name: str, lists: Mapping[str, Sequence[str]]) -> bool | None:
    """Whether a busy worker is to empty itself for a suspect that has waited for two seconds; None: nobody knows."""
    ages = []
    if not world.held[name] or world.client.get(keys.HOLD) not in (None, name.encode()):
        return False
    for key in _suspects(name):
        if view := _waits(world, lists, key):
            ages.append(world.client.time()[0] * 1000 - view.number("suspect_at"))
    return True if any(age > 3_000 for age in ages) else False if all(age < 0 for age in ages) else None


def _suspects(name: str) -> tuple[str, ...]:
    """The lists of suspects that a worker looks at."""
    return f"{keys.LIKE_SUSPECTS}{CARDS[name].identity}", f"{keys.SUSPECTS}.{CARDS[name].name}", keys.SUSPECTS


def _waits(world: World, lists: Mapping[str, Sequence[str]], key: str) -> View | None:
    """The job at a list's head, if it is one that waits."""
    view = world.views.get((lists.get(key) or [""])[0])
    return view if view and view.fields["status"] == "queued" else None


def suspend(world: World) -> None:
    """``rq suspend`` holds, and then somebody without a lease asks."""
    name = world.random.choice(list(CARDS))
    held = {job.id: job.attempt for job in world.held[name].values()}
    world.client.set(keys.SUSPENDED, 1)
    try:
        assert world.store.claim(Wanted(name, CARDS[name], 4, 0)).jobs == ()
        assert world.store.renew(name, "busy", held, {}).suspended
    finally:
        world.client.delete(keys.SUSPENDED)
    assert world.store.claim(Wanted("nobody", CARDS[name], 4, 0)).jobs == (), "without a lease"


def suspects_wait(world: World) -> None:
    """Suspects have waited for long: the first busy worker that sees one takes nothing any more, and no other does."""
    lists = {key: ids for key, ids in world.lists().items() if key.startswith(keys.SUSPECTS)}
    for job_id in (job_id for ids in lists.values() for job_id in ids):
        if job_id in world.ids and world.views[job_id].job.state is S.QUEUED:
            world.client.hset(f"{keys.JOB}{job_id}", "suspect_at", 1)
    heads = [view.job.id for key in lists if (view := _waits(world, lists, key))]
    if heads and world.chance(0.3):
        world.store.cancel(world.random.choice(heads))
    if world.chance(0.5):
        busy = [name for name in CARDS if world.held[name]]
        for name in world.random.choices(busy, k=4) if busy else ():
            world.views = world.look_at(world.ids)
            claim_as(world, name, 2)
