"""The acts of the model test's walk: here those of clients, and what must come of each.

``tests.model_claim`` and ``tests.model_work`` have what workers do, ``tests.model_clock`` what the house's clock does,
``tests.model_faults`` what goes wrong, ``tests.model_rq`` what stock RQ does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import pytest

from core.errors import DeadlineUnreachable, HeadraceError, JobConflict, JobNotFound, QueueFull, StoreFull
from core.request import Request
from jobs import commands, dead_letters, keys
from jobs.job import FINAL, JobState, NewJob, Resume
from jobs.memory import MemoryReport
from jobs.scripting import Command
from tests.jobs_world import list_of
from tests.model_claim import claim, suspects_wait, suspend
from tests.model_clock import expire, forget, lose_patience, promote
from tests.model_faults import die, fall_silent, leave, mend, mend_nobody
from tests.model_hooks import collect, come_for_nothing, note, outlast_leases, resend
from tests.model_rq import push_twice, rq_cancel, rq_clean, rq_enqueue, rq_requeue
from tests.model_walk import JOBS, World, gone
from tests.model_work import publish, release, renew, settle, zombie

S = JobState

# -- what clients do


def submit(world: World) -> None:
    if len(world.ids) >= JOBS:
        return
    world.made += 1
    job_id, pick = f"j{world.made}", world.random
    model, priority = pick.choice((None, None, None, "Toy", "other")), pick.choice((0, 0, 0, -7, 5, 30))
    request = Request(prompt=job_id, model=model, priority=priority)
    new = NewJob(
        id=job_id, request=request, resume=pick.choice([*Resume, Resume.WAIT]),
        deadline_seconds=600.0 if world.chance(0.4) else None, refuse_if_late=world.chance(0.5),
        result_ttl_seconds=pick.choice((86_400, 86_400, 500, 7200)),
        webhook="https://hooks.example/" if world.chance(0.6) else None,
    )  # fmt: skip
    world.client.srem(keys.QUEUES, list_of(priority))
    if world.chance(0.1):  # one of that name was forgotten a moment ago
        world.client.xadd(f"{keys.EVENTS}{job_id}", {"f": 1}, "7-0")
    try:
        submitted = world.store.submit(new)
    except JobNotFound as error:
        raise AssertionError("submitted, and not there") from error
    job = submitted.job
    assert (submitted.created, job.state, job.model, job.priority) == (True, S.QUEUED, model, priority)
    assert world.client.lindex(list_of(priority), -1) == job_id.encode(), "not at the queue's end"
    assert world.client.sismember(keys.QUEUES, list_of(priority)), "RQ does not know of the queue"
    if world.chance(0.3):  # its failures are kept otherwise
        world.client.hset(f"{keys.JOB}{job_id}", "failure_ttl", pick.choice((-1, 900)))
    if world.ids and world.chance(0.6) and (born := world.views[pick.choice(world.ids)].kept.born):
        world.client.zadd(f"{keys.INDEX}generate:queued", {job_id: born})  # created with another, and then retried
    if world.chance(0.5):
        fields = {
            "retries_left": pick.choice((1, 2)),
            "retry_intervals": "[0, 5]",
            "enqueue_at_front_on_retry": pick.choice((0, 1)),
        }
        world.client.hset(f"{keys.JOB}{job_id}", mapping=fields)
    world.ids.append(job_id)
    world.views[job_id] = world.look(job_id)


def submit_too_much(world: World) -> None:
    """A full queue, a full memory and a queue that is too long for the deadline: refused, and nothing is there."""
    if world.chance(0.5):  # more ended of late
        key = f"{keys.RATE}{world.client.time()[0] // 10 - world.random.randint(0, 8)}"
        world.client.incrby(key, 5)
        world.client.expire(key, 300)
        world.credit = 5
    (now, _), speeds = world.client.time(), {}
    for bucket in range(now // 10 - 6, now // 10 + 1):
        speeds[bucket] = int(world.client.get(f"{keys.RATE}{bucket}") or 0)
    store, report = world.store, world.store.queue()
    oldest = min((bucket for bucket, number in speeds.items() if number), default=now // 10)
    speed = sum(speeds.values()) / max(10, now - oldest * 10)
    assert world.client.time()[0] != now or abs(report.completions_per_second - speed) <= speed / 10
    queued, speed = report.states[S.QUEUED], report.completions_per_second
    job = NewJob(id="never", request=Request(prompt="x", priority=100), deadline_seconds=0.001, refuse_if_late=True)
    few = dataclasses.replace(store._settings, max_queued=max(queued, 1))
    room, full = MemoryReport(used_bytes=1, limit_bytes=10), MemoryReport(used_bytes=9, limit_bytes=10)
    tries: list[tuple[Command[Any], type[HeadraceError]]] = [(commands.submit(job, few, full), StoreFull)]
    tries += [(commands.submit(job, few, room), QueueFull)] if queued else []
    tries += [(commands.submit(job, store._settings, room), DeadlineUnreachable)] if queued and speed else []
    for command, refused in tries:
        error = _refused(world, command)
        assert isinstance(error, refused), f"not refused with {refused.__name__}"
        if isinstance(error, QueueFull):
            wait = min(math.ceil(1 / speed), 120) if speed else 120
            assert abs(error.retry_after_seconds - wait) <= 1, f"{error}, and {wait} s were right"
    assert not world.client.exists(f"{keys.JOB}never")


def _refused(world: World, command: Command[Any]) -> HeadraceError | None:
    try:
        world.store._runner.run(command)
    except HeadraceError as error:
        return error
    return None


def ask_for_nobody(world: World) -> None:
    asks: tuple[Callable[[str], object], ...] = (
        world.store.cancel, world.store.retry, world.store.delete, world.store.get,
        lambda job_id: world.store._runner.run(commands.resend(job_id)),
    )  # fmt: skip
    for ask in asks:
        try:
            ask("nobody")
        except JobNotFound:
            continue
        raise AssertionError(f"{ask} found nobody")
    for read in (commands.follow, commands.show):
        assert world.store._runner.run(read("nobody", -1)) == []
    assert not world.client.exists(f"{keys.JOB}nobody"), "shown, and there"


def submit_again(world: World) -> None:
    if (job_id := world.any_id()) and job_id not in world.touched:
        repeats = int(world.client.get(keys.REPEATS) or 0)
        again = world.store.submit(NewJob(id=job_id, request=Request(prompt="y")))
        assert int(world.client.get(keys.REPEATS)) == repeats + 1, "nothing was written that could be waited for"
        assert (again.created, again.job.state) == (False, world.views[job_id].job.state)
        assert again.job.request is not None
        assert again.job.request.prompt == job_id


def cancel(world: World) -> None:
    deferred = [job_id for job_id, view in world.views.items() if view.fields["status"] == "deferred"]
    job_id = world.any_id(S.RUNNING) if world.chance(0.5) else world.any_id()
    if deferred and world.chance(0.3):
        job_id = world.random.choice(deferred)
    if job_id and job_id not in world.by_rq:
        before, results = world.views[job_id].job.state, world.client.xlen(f"{keys.RESULTS}{job_id}")
        after = world.store.cancel(job_id)
        assert world.client.xlen(f"{keys.RESULTS}{job_id}") == results, "cancelled, and RQ has a result"
        assert before not in FINAL
        assert (after.state, after.cancel_requested) == (
            (S.RUNNING, True) if before is S.RUNNING else (S.CANCELLED, False)
        )


def retry(world: World) -> None:
    if job_id := world.any_id(S.FAILED) if world.chance(0.8) else world.any_id():
        before, (now, micro) = world.seen(job_id).job, world.client.time()
        dead = dead_letters.ONLY_DEAD if world.chance(0.2) else ""
        [moved, *_] = world.store._runner.run(Command("retry", [job_id, dead], list))
        may = before.state is S.FAILED and (not dead or before.reason == "poison_job")
        assert (moved == dead_letters.MOVED) == may, f"retry {dead} of {before.state}, {before.reason}: {moved}"
        if may:
            view = world.look(job_id)
            assert (view.job.state, view.job.error, view.log, view.job.started_at) == (S.QUEUED, None, [], None)
            patience = view.number("deadline_in")
            asked = now * 1000 + micro // 1000 + patience
            assert not patience or view.number("deadline_at") >= asked, "it has not its whole time again"
            suspect = [key.startswith(keys.SUSPECTS) for key, _ in view.facts.lists]
            assert job_id in world.pushed or suspect == [view.job.crashes >= 2]


def delete(world: World) -> None:
    over = [job_id for job_id in world.ids if world.views[job_id].job.state in FINAL]
    if job_id := world.random.choice(over) if len(over) > 4 else world.any_id(S.QUEUED, S.RUNNING):
        over_now = world.seen(job_id).job.state in FINAL
        try:
            world.store.delete(job_id)
        except JobConflict:
            assert not over_now, f"{job_id} has ended, and cannot be deleted"
            return
        assert over_now, f"{job_id} was deleted before its end"
        gone(world, job_id)


def show(world: World) -> None:
    """Somebody reads an answer: from now on it is never started over, and only its like goes on."""
    begun = [job_id for job_id in world.ids if world.views[job_id].drawn and world.views[job_id].job.state not in FINAL]
    job_id = world.random.choice(begun) if begun and world.chance(0.7) else world.any_id()
    if job_id and job_id not in world.by_rq:
        seen = world.shown.get(job_id, [])
        fresh = world.store._runner.run(commands.show(job_id, seen[-1].number if seen else -1))
        view = world.look(job_id)
        assert seen + fresh == list(view.log), f"{job_id}: shown {seen}, then {fresh}"
        assert view.job.state in FINAL or view.fields.get("read") == "1", f"{job_id}: shown, and nobody knows"
        world.shown[job_id] = list(view.log)


def follow(world: World) -> None:
    """Somebody begins to read along: whoever publishes hears of it, and what is there may still start over."""
    if (job_id := world.any_id(S.RUNNING) if world.chance(0.5) else world.any_id()) and job_id not in world.by_rq:
        before, after = world.views[job_id], world.random.choice((-1, -1, 2))
        found = world.store._runner.run(commands.follow(job_id, after))
        view = world.look(job_id)
        assert found == [event for event in view.log if event.number > after]
        watched = {} if view.job.state in FINAL else {"watched": "1"}
        assert view.fields == {**before.fields, **watched}, f"{job_id}: followed, and is {view.fields}"


def mourn(world: World) -> None:
    """Dead letters are listed, all of them and nothing else; what is dead no more is dropped."""
    for each in world.ids if world.chance(0.5) else ():  # worse than they were
        if world.views[each].job.state is S.FAILED and each not in world.touched and world.chance(0.5):
            world.client.hset(f"{keys.JOB}{each}", "reason", "poison_job")
            world.client.zadd(keys.DEAD, {each: world.random.random()})
    views = world.look_at(world.ids)
    dead = [job_id for job_id, view in views.items() if (view.job.state, view.job.reason) == (S.FAILED, "poison_job")]
    for stale in (world.any_id(S.FAILED), world.any_id(), "ghost") if world.chance(0.5) else ():
        if stale and stale not in dead:
            world.client.zadd(keys.DEAD, {stale: world.random.choice((1, 9e15))})
    limit = world.random.choice((1, 1, 2, 100))
    assert {*_page_dead(world, limit)} == {*dead}
    if limit < 100:
        world.store._runner.run(dead_letters.page(None, 100))  # drops the rest of what is none
    found = [job_id.decode() for job_id in world.client.zrevrange(keys.DEAD, 0, -1)]
    assert ({*found}, _page_dead(world, limit)) == ({*dead}, found)
    with pytest.raises(JobNotFound):
        world.store._runner.run(dead_letters.page("nobody", 1))
    last = world.store._runner.run(dead_letters.page(None, max(len(found), 1)))
    assert ([job.id for job in last.jobs], last.more) == (found, False)
    if job_id := world.any_id(S.FAILED, S.QUEUED) if world.chance(0.5) else None:
        job_id = world.random.choice([job_id, *dead])
        job = world.look(job_id).job
        [moved, *_] = world.store._runner.run(Command("delete", [job_id, dead_letters.ONLY_DEAD], list))
        assert (moved == dead_letters.MOVED) == (job_id in dead), f"{job.state}, {job.reason}: {moved}"


def _page_dead(world: World, limit: int) -> list[str]:
    """All dead letters, page by page, as a purge reads them."""
    found: list[str] = []
    for _ in range(10 * JOBS):
        page = world.store._runner.run(dead_letters.page(found[-1] if found else None, limit))
        assert len(page.jobs) <= limit
        found += [job.id for job in page.jobs]
        if not page.more:
            return found
    raise AssertionError("there always is more")


def page(world: World) -> None:
    """Pages agree with the jobs, whatever the index had too much or stock RQ moved."""
    views = world.look_at(world.ids)
    new = {job_id for job_id in world.ids if not views[job_id].fields.get("place")}  # put in by stock RQ
    for job_id in world.ids if world.chance(0.5) else ():
        if not world.client.zscore(key := f"{keys.INDEX}generate:{world.random.choice(list(S))}", job_id):
            world.client.zadd(key, {job_id: 1})
    found = _page(world, ())
    assert _page(world, [S.FAILED, S.QUEUED]) <= found
    for job_id in world.ids:
        world.store._runner.run(commands.reindex([job_id]))
    assert found - new == {job_id for job_id in world.ids if world.client.exists(f"{keys.JOB}{job_id}")} - new
    world.by_rq -= found - new


def _page(world: World, states: Collection[S]) -> set[str]:
    """``Store.list``, which goes on for as long as something is stale; here nothing may be stale twice."""
    ask = commands.page(states, (), None, 10 * JOBS)
    world.store._runner.run(commands.reindex(world.store._runner.run(ask)[1]))
    jobs, stale = world.store._runner.run(ask)
    assert stale == [], f"not put right: {stale}"
    return {job.id for job in jobs}


#: Each act, and how likely it is.
ACTS: dict[Callable[[World], None], int] = {
    submit: 16, submit_too_much: 1, submit_again: 2, ask_for_nobody: 1, cancel: 2, retry: 4, delete: 8, show: 5,
    follow: 4, page: 2, mourn: 4,
    claim: 24, publish: 18, settle: 7, zombie: 12, release: 6, renew: 4, suspend: 1, suspects_wait: 3,
    expire: 2, lose_patience: 2, forget: 3, promote: 4,
    collect: 4, note: 5, resend: 2, outlast_leases: 2, come_for_nothing: 1,
    die: 9, fall_silent: 3, leave: 3, mend: 8, mend_nobody: 1,
    push_twice: 3, rq_enqueue: 4, rq_cancel: 2, rq_requeue: 4, rq_clean: 1,
}  # fmt: skip
