"""Callbacks in the model test: what couriers and clients do with them, and what must hold of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from core.errors import JobConflict
from jobs import commands, keys, outbox
from jobs.job import FINAL, JobState
from tests.model_judge import View
from tests.model_walk import World

S = JobState
WEEK_MS = 7 * 86_400_000


@dataclass(frozen=True, slots=True)
class Record:
    """A callback at one moment."""

    fields: Mapping[str, str]
    expires: bool

    @property
    def state(self) -> str:
        return self.fields["state"]

    @property
    def attempts(self) -> int:
        return int(self.fields["attempts"])


def collect(world: World) -> None:
    """What is due is taken, once, and counted."""
    bound, before = world.random.choice((1, 2, 100)), records(world)
    due = {name.decode() for name in world.client.zrangebyscore(keys.OUTBOX, "-inf", _now(world))}
    got = world.store._runner.run(outbox.collect(60, bound))
    assert len({each.id for each in got}) == len(got) == min(bound, len(due)), f"{got} of {due}"
    for each in got:
        record = before[each.id]
        told = (each.job_id, each.type, each.attempt, each.tries)
        tries = record.attempts + 1 - int(record.fields["before"])
        assert told == (record.fields["job"], record.fields["type"], record.attempts + 1, tries)
    again = world.store._runner.run(outbox.collect(60, 100))
    assert not {each.id for each in got} & {each.id for each in again}, "taken under another's lease"
    world.carried = [*world.carried, *got, *again][-20:]


def note(world: World) -> None:
    """A courier says how it went; perhaps too late."""
    if not world.carried:
        return
    callback, state = world.random.choice(world.carried), world.random.choice(("delivered", "failed", "pending"))
    before = records(world).get(callback.id)
    counts = before is not None and before.state == "pending"
    counts = counts and (state == "delivered" or (before and before.attempts) == callback.attempt)
    again = world.random.choice((0, 3600))
    assert world.store._runner.run(outbox.note(callback, state, "no", again)) == counts
    after, waits = records(world).get(callback.id), world.client.zscore(keys.OUTBOX, callback.id)
    if not counts:
        assert after == before
    elif state == "pending":
        assert after is not None
        assert (after.state, after.fields["error"], waits - _now(world) > 3e6) == ("pending", "no", again > 0)
    else:
        view = world.look_at([callback.job_id]).get(callback.job_id)
        assert waits is None
        assert (after is not None) == (view is not None and view.fields.get("callback") == callback.id)
        assert after is None or (after.state, "error" in after.fields) == (state, state == "failed")


def resend(world: World) -> None:
    """A person has it sent again: under its id, at once, with all its tries."""
    told = [each.fields["job"] for each in records(world).values() if each.state != "pending"]
    known = [job_id for job_id in told if job_id in world.ids]
    job_id = world.random.choice(known) if known and world.chance(0.5) else world.any_id()
    if not job_id or job_id in world.touched:
        return
    view, before = world.look(job_id), records(world)
    try:
        world.store._runner.run(commands.resend(job_id))
    except JobConflict:
        assert view.job.state not in FINAL or "webhook" not in view.fields, f"{job_id}: not sent again"
        assert records(world) == before
        return
    assert view.job.state in FINAL
    name, after = view.fields["callback"], records(world)
    assert (after.keys(), after[name].state, after[name].expires) == (before.keys(), "pending", False)
    assert after[name].attempts == before[name].attempts == int(after[name].fields["before"])
    assert world.client.zscore(keys.OUTBOX, name) <= _now(world)


def outlast_leases(world: World) -> None:
    for name in world.client.zrange(keys.OUTBOX, 0, -1):
        if world.chance(0.7):
            world.client.zadd(keys.OUTBOX, {name: 1 + _now(world) - WEEK_MS // 2})


def come_for_nothing(world: World) -> None:
    """Nobody came for a week, and for less than that."""
    names = [name.decode() for name in world.client.zrange(keys.OUTBOX, 0, -1)]
    late = [name for name in names if world.chance(0.3)]
    for name in names:
        world.client.zadd(keys.OUTBOX, {name: _now(world) - WEEK_MS + (-9_000 if name in late else 60_000)})
    before = records(world)
    world.store.expire()
    after = records(world)
    for name in names:
        assert (name in late) == (world.client.zscore(keys.OUTBOX, name) is None), f"{name} late: {name in late}"
        assert name not in late or name not in after or after[name].state == "failed"
        assert name in late or after[name] == before[name]


def judge_callbacks(
    before: Mapping[str, View], world: World, act: str, found: Mapping[str, Record], waiting: Sequence[str]
) -> Iterator[str]:
    """What is wrong with all callbacks together: one for each end, there until it is over, and then with its job."""
    fresh: dict[str, list[str]] = {}
    for name in found.keys() - world.told:
        fresh.setdefault(found[name].fields["job"], []).append(name)
    world.told |= found.keys()
    for name, record in found.items():
        view = world.views.get(record.fields["job"])
        own = view is not None and view.fields.get("callback") == name
        if (record.state == "pending") != (name in waiting):
            yield f"{name} is {record.state}, in the outbox: {name in waiting}"
        if not (own or record.state == "pending" or record.expires):
            yield f"{name} is {record.state}, and nobody's for ever"
        if record.state == "pending" and record.expires:
            yield f"{name} is pending, and will be forgotten"
    yield from (f"{name} waits, and there is no such" for name in waiting if name not in found)
    for job_id, view in world.views.items():
        yield from (f"{job_id}: {each}" for each in _judge_own(before.get(job_id), view, fresh.get(job_id, []), act))


def _judge_own(before: View | None, view: View, fresh: Sequence[str], act: str) -> Iterator[str]:
    if act == "mend" or act.startswith("rq_"):
        return  # a doctor makes anew what was lost
    ended = _over(view) and not (before and _over(before)) and "webhook" in view.fields
    if len(fresh) != ended:
        yield f"{before and before.job.state} -> {view.job.state} by {act}, with the new callbacks {fresh}"
    if view.job.state not in FINAL and "closed" not in view.fields and "callback" in view.fields:
        yield f"{view.job.state}, and told of"


def _over(view: View) -> bool:
    """It has ended, and somebody of ours knows."""
    return view.job.state in FINAL and "closed" in view.fields


def records(world: World) -> dict[str, Record]:
    """Every callback there is."""
    return read_records(world.house().callbacks)


def read_records(found: Sequence[tuple[str, Sequence[str], int]]) -> dict[str, Record]:
    """What a glance says of callbacks."""
    return {
        key.removeprefix(keys.CALLBACK): Record(dict(zip(fields[::2], fields[1::2], strict=True)), bool(expires))
        for key, fields, expires in found
    }


def _now(world: World) -> float:
    seconds, micro = world.client.time()
    return float(seconds * 1000 + micro / 1000)
