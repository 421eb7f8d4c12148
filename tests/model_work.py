"""What workers do in the model test: claim, publish, settle, release, renew; each asserts what must come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import redis

from core.errors import EngineError
from core.request import Choice, TokenEvent
from jobs import commands, keys
from jobs.job import JobState, Resume
from jobs.reports import LoggedEvent
from jobs.store import ClaimedJob, Outcome, Publication, Settlement
from tests.jobs_world import ended, failed
from tests.model_house import CARDS
from tests.model_judge import NOT_THERE, View
from tests.model_walk import World, answer_of

S = JobState


def publish(world: World) -> None:
    if (found := world.any_held()) is None:
        return
    name, job = found
    view = world.seen(job.id)
    first = view.log[-1].number + 1 if view.log and view.job.attempt == job.attempt else job.next_event
    said = world.speech(job, view.number("tokens"), first, world.random.randint(1, 3))
    settled = view.fields.get("settled") == str(job.attempt)
    ours = view.job.attempt == job.attempt and (view.job.state is S.RUNNING or _waits_reaped(view))
    if ours and not settled and world.chance(0.1):
        assert _leaves_a_hole(world, dataclasses.replace(said, first=first + 3))
    if ours and view.job.state is S.RUNNING and world.chance(0.1):
        born, model = int(view.kept.born), view.job.model or ""
        adoption = commands.adopt(job, view.job.kind, model, view.job.priority, born, route=False)
        assert world.store._runner.run(adoption) == 1, f"{job.id}: not adopted by its own"
    for _ in range(world.random.choice((1, 1, 2))):
        stranger = dataclasses.replace(said, job_id="unknown")
        together = world.random.choice(([said], [stranger, said], [said, stranger]))
        reported = world.store.report(together, [])
        assert ("unknown" in reported.refused) == (len(together) == 2)
        assert (job.id in reported.refused) != (ours or (settled and view.job.attempt == job.attempt))
        wanted = ours and not settled
        assert (job.id in reported.cancels) == (wanted and view.job.cancel_requested)
        assert (job.id in reported.watched) == (wanted and not view.job.cancel_requested and "watched" in view.fields)
    after = world.look(job.id)
    if not ours or settled:
        assert len(after.drawn) == len(view.drawn), f"{job.id}: said by whom it does not belong to"
        world.held[name].pop(job.id, None)
        return
    assert "watched" not in after.fields or after.fields.get("read") == "1", f"{job.id}: read along, and may start over"
    for event, meant in zip(after.log[-len(said.events) :], said.events, strict=True):
        told = (event.fields["index"], event.fields["text"], tuple(event.fields["token_ids"]))
        assert told == (meant.index, meant.text, meant.token_ids)
        assert len(event.fields.get("logprobs", ())) == len(meant.logprobs or ())


def _waits_reaped(view: View) -> bool:
    """Queued, and not because stock RQ has put it there after it had ended."""
    return view.job.state is S.QUEUED and "closed" not in view.fields


def _leaves_a_hole(world: World, said: Publication, *ends: Settlement) -> bool:
    try:
        world.store.report([said], ends)
    except redis.ResponseError as error:
        return "leaves a hole" in str(error)
    return False


def settle(world: World) -> None:
    if (found := world.any_held()) is not None:
        name, job = found
        del world.held[name][job.id]
        world.zombies.append(job)
        end(world, job)


def end(world: World, job: ClaimedJob) -> None:
    """Settle, perhaps several times; refused unless the attempt is the job's, and then exactly as it was said."""
    pick, view = world.random, world.seen(job.id)
    outcome = pick.choice([Outcome.SUCCEEDED, *Outcome])
    if view.number("retries_left") and world.chance(0.6):
        outcome = Outcome.FAILED
    error = pick.choice([None, EngineError("again"), EngineError("again")])
    same, state = view.job.attempt == job.attempt, view.job.state
    first = view.log[-1].number + 1 if view.log and same else job.next_event
    words = [world.speech(job, view.number("tokens"), first, pick.randint(1, 3))] if world.chance(0.4) else []
    log, whole = [*view.log, *(_logged(each) for said in words for each in said.events)], world.chance(0.7)
    answer = answer_of(log if whole else [])
    if view.job.resume is Resume.ANY and whole and world.chance(0.5):  # as long, and not what was published
        answer = dataclasses.replace(answer, choices=tuple(map(_in_other_words, answer.choices)))
    settlement = failed(job, error) if outcome is Outcome.FAILED else ended(job, outcome, answer)
    settled = same and view.fields.get("settled") == str(job.attempt)
    counts = same and not settled and (state is S.RUNNING or (_waits_reaped(view) and outcome is Outcome.SUCCEEDED))
    if counts and words and world.chance(0.2):
        assert _leaves_a_hole(world, dataclasses.replace(words[0], first=first + 3), settlement)
    dependents = counts and world.client.exists(f"{keys.JOB}{job.id}:dependents")
    for number in range(pick.choice((1, 2, 3))):
        reported = world.store.report(words, [settlement])
        refused = job.id in reported.refused
        assert refused != (counts or settled), f"{outcome} of {job.id} refused: {refused}"
        assert number or view.number("retries_left") or bool(reported.with_dependents) == bool(dependents)
    after = world.look(job.id)
    said = sum(len(event.token_ids) for each in words for event in each.events) if counts else 0
    assert after.number("tokens") == view.number("tokens") + said
    if not counts:
        assert after.job.state is state or job.id in world.by_rq, f"{job.id}: {state}, {after.job.state} for nothing"
    elif view.number("retries_left") and error and outcome is Outcome.FAILED and not view.job.cancel_requested:
        assert (after.job.state, after.number("retries_left")) == (S.QUEUED, view.number("retries_left") - 1)
        assert after.fields["status"] == ("queued" if view.number("retries_left") == 2 else "scheduled")
        assert after.facts.places >= {"scheduled"} or stands_where_it_should(world, after)
    else:
        _judge_end(world, view, after, log, settlement)


def _logged(event: TokenEvent) -> LoggedEvent:
    """A token event as a log's reader sees it, as far as ``answer_of`` looks."""
    return LoggedEvent(number=0, type="token", fields={"index": event.index, "text": event.text})


def _in_other_words(choice: Choice) -> Choice:
    return dataclasses.replace(choice, text=choice.text.replace("1", "2"))


def _judge_end(world: World, before: View, after: View, log: Sequence[LoggedEvent], settlement: Settlement) -> None:
    outcome, status, kept = settlement.outcome, after.fields["status"], after.kept
    [(_, entry)] = world.client.xrevrange(f"{keys.RESULTS}{after.job.id}", count=1)
    assert entry[b"type"] == {"finished": b"1", "failed": b"2"}.get(status, b"3"), f"{status}, for RQ {entry[b'type']}"
    registry = {"finished": keys.FINISHED, "failed": keys.FAILED, "stopped": keys.FAILED, "canceled": keys.CANCELED}
    until = 0 if status == "canceled" else after.keep_seconds
    score = world.client.zscore(registry[status], after.job.id)
    assert score == float("inf") if until < 0 else abs(score - (after.job.finished_at or 0) - until) < 3
    if not world.client.sismember(keys.UNPACKED, after.job.id):
        late = kept.seen_at - 1_000 * (after.job.finished_at or 0) > 1_000
        left = 0 < kept.events_ms <= 2_000 if "watched" in before.fields else kept.events_ms == NOT_THERE
        assert left or late, f"followed: {'watched' in before.fields}, and its last event stays {kept.events_ms} ms"
    assert after.fields.get("ticket") != "0"
    assert after.job.state == outcome.value, f"{outcome}, and is {after.job.state}"
    assert (after.fields["status"] == "stopped") == (outcome is Outcome.CANCELLED and not before.job.cancel_requested)
    assert after.job.attempt == settlement.attempt
    if settlement.error:
        assert (after.job.error or {})["code"] == settlement.error.code
        return
    assert settlement.result is not None
    found, said = after.job.result or {}, settlement.result.to_wire()
    assert [each["text"] for each in found["choices"]] == [each["text"] for each in said["choices"]]
    whole = settlement.result.choices == answer_of(log).choices
    if outcome is Outcome.SUCCEEDED and whole and after.job.resume is not Resume.ANY and after.drawn:
        packed = world.client.hget(f"{keys.JOB}{after.job.id}", "log")
        assert packed[:1] == b"R", "the texts are kept twice"


def zombie(world: World) -> None:
    """Somebody who lost a job speaks about it: refused and without effect, but for a late result."""
    world.zombies = [job for job in world.zombies if job.id in world.ids][-20:]
    if not world.zombies:
        return
    reaped = [job for job in world.zombies if world.views[job.id].job.state is S.QUEUED]
    job = world.random.choice(reaped if reaped and world.chance(0.3) else world.zombies)
    what = world.random.choice(["release", "publish", "publish", "adopt", "end", "end"])
    view = world.seen(job.id)
    lost = view.job.attempt != job.attempt or view.job.state is not S.RUNNING
    if what == "end":
        end(world, job)
    elif what == "release":
        release_now(world, job)
    elif what == "adopt" and lost:
        told = commands.adopt(job, view.job.kind, "other", 0, 1, route=world.chance(0.5))
        assert world.store._runner.run(told) == 0, f"{job.id}: adopted by whom it does not belong to"
    elif what == "publish":
        said = world.speech(job, view.number("tokens"), view.number("events") + 5, 1)
        refused = lost and not (view.job.attempt == job.attempt and _waits_reaped(view))
        settled = view.job.attempt == job.attempt and view.fields.get("settled") == str(job.attempt)
        try:
            assert (job.id in world.store.report([said], []).refused) == (refused and not settled)
        except redis.ResponseError:  # a hole in its log
            assert not refused
            assert not settled


def release(world: World) -> None:
    if (found := world.any_held()) is not None:
        name, job = found
        del world.held[name][job.id]
        world.zombies.append(job)
        release_now(world, job)


def release_now(world: World, job: ClaimedJob) -> None:
    view = world.seen(job.id)
    ours = view.job.attempt == job.attempt and view.job.state is S.RUNNING
    assert world.store._runner.run(commands.release(job.id, job.attempt)) == ours, f"{job.id}: released, {ours}"
    if world.chance(0.5):
        world.store.release([(job.id, job.attempt)])
    after = world.look(job.id)
    if view.job.attempt != job.attempt or view.job.state is not S.RUNNING:
        assert after.job.state is view.job.state or job.id in world.by_rq, f"{job.id}: released by another"
    elif view.job.cancel_requested:
        assert after.job.state is S.CANCELLED
    else:
        assert after.job.state is S.QUEUED
        key = after.facts.lists[0][0]
        suspect = view.job.crashes >= 2
        assert job.id in world.pushed or key.startswith(keys.SUSPECTS) == suspect
        assert job.id in world.pushed or world.client.lindex(key, -1 if suspect else 0) == job.id.encode()


def renew(world: World) -> None:
    name = world.random.choice(list(CARDS))
    if world.held[name] and world.chance(0.3):
        world.zombies.append(world.held[name].popitem()[1])  # it forgot one
    held = {job.id: job.attempt for job in world.held[name].values()} | ({"ghost": 1} if world.chance(0.2) else {})
    if world.zombies and world.chance(0.5):
        old = world.random.choice(world.zombies)  # it never heard that it lost this one
        held.setdefault(old.id, old.attempt)
    views = {job_id: world.views.get(job_id) for job_id in held}
    beat = world.store.renew(name, "busy", held, {})
    ours = {
        job_id: view for job_id, view in views.items()
        if view and view.job.state is S.RUNNING and view.job.attempt == held[job_id]
    }  # fmt: skip
    assert set(beat.lost) == set(held) - set(ours)
    assert set(beat.cancels) == {job_id for job_id, view in ours.items() if view.job.cancel_requested}
    assert not beat.suspended
    for job_id in beat.lost:
        if job_id in world.held[name]:
            world.zombies.append(world.held[name].pop(job_id))
    [card] = [card for card in world.store.workers() if card.name == name]
    assert (card.state, card.running, card.host) == ("busy", len(held), "h")
    running = {
        job_id
        for job_id in world.ids
        if (view := world.views[job_id]).job.state is S.RUNNING and view.job.worker == name
    }
    assert running - set(held) <= {job_id for job_id, _ in beat.unknown}
    world.store.release(beat.unknown)


def stands_where_it_should(world: World, view: View) -> bool:
    """Whether a job that RQ tries again is at that end of its list that its submitter wanted."""
    end_of = 0 if view.fields.get("enqueue_at_front_on_retry") == "1" else -1
    found = [world.client.lindex(key, end_of) for key, _ in view.facts.lists]
    return view.job.id in world.pushed or found == [view.job.id.encode()]
