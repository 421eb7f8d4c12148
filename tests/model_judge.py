"""What must hold of each job after every step of the model test: by itself, and between two moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jobs import audit, keys
from jobs.job import FINAL, MOVES, Job, JobState, Resume
from jobs.store import LoggedEvent
from tests.jobs_world import list_of

S = JobState
NOT_THERE, FOR_EVER = -2, -1  #: what Redis says of how long a key lives
SLACK_MS = 60_000  #: that a doctor or a slow test may be late by
IDS = 97  #: token n of an answer has this id times n: most take two bytes in a packed log


KEEP = 86_400  #: seconds, of the jobs that do not say
#: Fields that are of use only while a job is unfinished.
FLEETING = {
    "cancel_requested", "published_attempt", "first_token", "read", "engine", "waiting_for", "last_heartbeat",
    "suspect_at", "text_bytes", "watched",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept beside a job's hash, and how long; negative: for ever, or not there."""

    seen_at: int  #: milliseconds
    seconds: int  #: of the hash
    results_seconds: int
    events_ms: int
    until: float  #: the time in milliseconds at which our clock forgets it; 0: never
    born: float  #: its place in the index
    executions: Sequence[int]


@dataclass(frozen=True, slots=True)
class View:
    """One job at one moment."""

    job: Job
    log: Sequence[LoggedEvent]
    fields: Mapping[str, str]  #: of its hash
    facts: audit.Facts
    kept: Kept

    @property
    def stays(self) -> bool:
        """Whether Redis will not forget it."""
        return self.kept.seconds < 0

    @property
    def keep_seconds(self) -> int:
        """How long it asks to be kept after its end; negative: for ever."""
        return int(self.fields.get("result_ttl" if self.job.state is S.SUCCEEDED else "failure_ttl") or KEEP)

    @property
    def drawn(self) -> list[LoggedEvent]:
        return [event for event in self.log if event.type == "token"]

    @property
    def spoke(self) -> bool:
        """Whether the last attempt has said a token."""
        return [event.type for event in self.log if event.type != "finished"][-1:] == ["token"]

    def number(self, name: str) -> int:
        return int(self.fields.get(name) or 0)


def judge_job(view: View) -> Iterator[str]:
    """What is wrong with any job by itself."""
    told = [token_id for event in view.drawn for token_id in event.fields["token_ids"]]
    if told != [IDS * n for n in range(len(told))] or view.number("tokens") != len(told):
        yield f"its tokens are {told}, {view.fields.get('tokens')} by its hash"
    if "".join(event.fields["text"] for event in view.drawn) != "".join(f"é{each}" for each in told):
        yield f"its texts are {[event.fields['text'] for event in view.drawn]}"
    numbers, events = [event.number for event in view.log], view.number("events")
    if numbers != list(range(events - len(numbers), events)):
        yield f"its log has the events {numbers} of {events}"
    if "finished" in [event.type for event in view.log][:-1]:
        yield "its log finished and went on"
    if view.job.state is S.RUNNING and (not view.stays or "suspect_at" in view.fields):
        yield f"runs, a suspect since {view.fields.get('suspect_at')}, and Redis will forget it: {not view.stays}"
    if view.job.state in FINAL:
        if not view.facts.places <= {"finished", "failed", "canceled", "retention", "dead"}:
            yield f"{view.job.state}, and is in {sorted(view.facts.places)}"
        if view.stays != (view.keep_seconds < 0) or "cancel_requested" in view.fields:
            yield f"{view.job.state}, and is kept for {view.kept.seconds} s, not {view.keep_seconds}"


def judge_ours(view: View) -> Iterator[str]:
    """What is wrong with a job that stock RQ never moved."""
    state, fields, places = view.job.state, view.fields, view.facts.places
    if state not in FINAL and (not view.stays or "retention" in places or view.kept.results_seconds >= 0):
        yield f"{state}, and will be forgotten: {view.kept}, is in {sorted(places)}"
    if view.kept.executions != ([view.job.attempt] if state is S.RUNNING else []):
        yield f"{state}, and attempts {view.kept.executions} run"
    if ("dead" in places) != (state is S.FAILED and view.job.reason == "poison_job"):
        yield f"{state} because of {view.job.reason}, is in {sorted(places)}"
    if state in FINAL:
        yield from judge_end(view)
    if ("deadlines" in places) != (state is S.QUEUED and "deadline_at" in fields):
        yield f"{state}, deadline {fields.get('deadline_at')}, is in {sorted(places)}"
    like, waits = fields.get("waiting_for"), [key for key, _ in view.facts.lists if ".like." in key]
    if ("waits" in places) != (like is not None) or (state is S.QUEUED and bool(waits) != (like is not None)):
        yield f"waits for {like}, is in {sorted(places)} and {waits}"
    if any(times > 1 for key, times in view.facts.lists if key in waits):
        yield f"waits twice: {view.facts.lists}"
    if like is not None and (like != fields["engine"] or not view.drawn):
        yield f"waits for {like} with {len(view.drawn)} tokens of {fields['engine']}"
    if like is not None and view.job.resume is not Resume.WAIT and fields.get("read") != "1":
        yield f"{view.job.resume}, and waits for {like}, though nobody has read of it"
    suspect = state is S.QUEUED and any(key.startswith(keys.SUSPECTS) for key, _ in view.facts.lists)
    if suspect and (view.job.crashes < 2 or "suspect_at" not in fields):
        yield f"a suspect after {view.job.crashes} crashes, since {fields.get('suspect_at')}"
    place = view.facts.lists[0][0] if fields["status"] == "queued" and len(view.facts.lists) == 1 else ""
    if place and not (waits or suspect) and place.partition(".")[0] != list_of(view.job.priority):
        yield f"of priority {view.job.priority}, and waits in {place}"
    if state not in FINAL and view.drawn and view.number("first_token") != view.drawn[0].number:
        yield f"its first token is {view.drawn[0].number}, not {fields.get('first_token')}"
    if state not in FINAL and "first_token_at" in fields and not view.drawn:
        yield "its first token came, and is not there"
    if state is S.RUNNING and (view.number("published_attempt") == view.number("attempt")) != view.spoke:
        yield f"published {fields.get('published_attempt')}, and spoke: {view.spoke}"
    if state is S.QUEUED and fields.get("worker_name"):
        yield f"waits at {fields['worker_name']}"
    if state is S.QUEUED and view.job.cancel_requested:
        yield "cancelled, and waits"
    begun = [event.fields["engine"]["dtype"] for event in view.log if event.type == "started"]
    if state is S.RUNNING and view.job.resume != "any" and view.drawn and len({*begun[_beginner(view) :]}) > 1:
        yield f"{view.job.resume}, and computed by {begun}"


def judge_end(view: View) -> Iterator[str]:
    """What is wrong with what is left of an ended job, and with how long."""
    fields, kept, keep = view.fields, view.kept, view.keep_seconds
    if not fields.get("ended_at"):
        yield f"{view.job.state}, and never ended"
    if left := FLEETING & {*fields}:
        yield f"{view.job.state}, and has {sorted(left)}"
    if view.job.state is S.SUCCEEDED and "deaths" in fields:
        yield "succeeded, and remembers deaths"
    if keep < 0:
        if "expires_at" in fields or kept.until:
            yield f"is to be kept for ever, and goes at {fields.get('expires_at')}, {kept.until}"
        return
    times = {view.number("expires_at"), kept.until, kept.seen_at + 1000 * kept.seconds}
    if kept.results_seconds != NOT_THERE:
        times.add(kept.seen_at + 1000 * kept.results_seconds)
    right = 1000 * ((view.job.finished_at or 0) + keep)
    if any(abs(time - right) > SLACK_MS for time in times):
        yield f"is kept until {sorted(times)}, and asked for {right}"
    if kept.events_ms == FOR_EVER:
        yield "its last events stay for ever"


def _beginner(view: View) -> int:
    """How many started before the one that began the answer that stands."""
    first = view.drawn[0].number
    return sum(event.type == "started" and event.number < first for event in view.log) - 1


def judge_change(before: View | None, after: View, act: str) -> Iterator[str]:
    """What is wrong with what one act did to a job."""
    was = before.job.state if before else S.QUEUED
    direct = MOVES[was] | ({S.QUEUED} if act == "rq_requeue" and was in FINAL else frozenset())
    if after.job.state not in direct | {was} | {later for each in direct for later in MOVES[each]}:
        yield f"{was} -> {after.job.state}"
    if before is None:
        return
    if after.job.attempt < before.job.attempt:
        yield "the fence fell"
    if before.job.crashes != after.job.crashes and act not in ("die", "fall_silent", "leave"):
        yield f"{before.job.crashes} crashes, and then {after.job.crashes}"


def judge_answer(before: View | None, after: View, act: str) -> Iterator[str]:
    """Whether an unfinished answer lost what was said of it, or an end changed; a claim may start an answer over."""
    if before is None:
        return
    if before.kept.born != after.kept.born and act != "mend":
        yield f"is indexed with {before.kept.born}, and then {after.kept.born}"
    if before.job.state is after.job.state in FINAL and before.job.result != after.job.result:
        yield f"ended with {before.job.result}, and then with {after.job.result}"
    if before.job.state in FINAL or after.job.state in FINAL:
        return
    if before.log and (not after.log or after.log[0].number != before.log[0].number):
        yield f"its log began at {before.log[0].number}, and now it is {after.log}"
    if len(after.drawn) < len(before.drawn) and (
        act not in ("claim", "suspects_wait") or after.job.resume != "restart" or after.drawn
    ):
        yield f"{after.job.resume}, and {act} took what was said: {after.log}"
