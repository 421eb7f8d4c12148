"""What must hold of each job after every step of the model test: by itself, and between two moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jobs import audit, keys
from jobs.job import FINAL, MOVES, Job, JobState
from jobs.store import LoggedEvent
from tests.jobs_world import list_of

S = JobState
IDS = 97  #: token n of an answer has this id times n: most take two bytes in a packed log


@dataclass(frozen=True, slots=True)
class View:
    """One job at one moment."""

    job: Job
    log: Sequence[LoggedEvent]
    fields: Mapping[str, str]  #: of its hash
    stays: bool  #: Redis will not forget it
    facts: audit.Facts

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


def judge_ours(view: View) -> Iterator[str]:
    """What is wrong with a job that stock RQ never moved."""
    state, fields, places = view.job.state, view.fields, view.facts.places
    if view.stays != (state not in FINAL) or ("retention" in places) != (state in FINAL):
        yield f"{state}, stays for ever: {view.stays}, is in {sorted(places)}"
    if ("deadlines" in places) != (state is S.QUEUED and "deadline_at" in fields):
        yield f"{state}, deadline {fields.get('deadline_at')}, is in {sorted(places)}"
    like, waits = fields.get("waiting_for"), [key for key, _ in view.facts.lists if ".like." in key]
    if ("waits" in places) != (like is not None) or (state is S.QUEUED and bool(waits) != (like is not None)):
        yield f"waits for {like}, is in {sorted(places)} and {waits}"
    suspect = state is S.QUEUED and any(key.startswith(keys.SUSPECTS) for key, _ in view.facts.lists)
    if suspect and (view.job.crashes < 2 or "suspect_at" not in fields):
        yield f"a suspect after {view.job.crashes} crashes, since {fields.get('suspect_at')}"
    place = view.facts.lists[0][0] if fields["status"] == "queued" and len(view.facts.lists) == 1 else ""
    if place and not (waits or suspect) and place.partition(".")[0] != list_of(view.job.priority):
        yield f"of priority {view.job.priority}, and waits in {place}"
    if state not in FINAL and view.drawn and view.number("first_token") != view.drawn[0].number:
        yield f"its first token is {view.drawn[0].number}, not {fields.get('first_token')}"
    if state is S.RUNNING and (view.number("published_attempt") == view.number("attempt")) != view.spoke:
        yield f"published {fields.get('published_attempt')}, and spoke: {view.spoke}"
    if state is S.QUEUED and fields.get("worker_name"):
        yield f"waits at {fields['worker_name']}"
    if state in FINAL and not fields.get("ended_at"):
        yield "never ended"
    if state is S.QUEUED and view.job.cancel_requested:
        yield "cancelled, and waits"
    begun = [event.fields["engine"]["dtype"] for event in view.log if event.type == "started"]
    if state is S.RUNNING and view.job.resume != "any" and view.drawn and len({*begun[_beginner(view) :]}) > 1:
        yield f"{view.job.resume}, and computed by {begun}"


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
    if before.job.state is after.job.state in FINAL and before.job.result != after.job.result:
        yield f"ended with {before.job.result}, and then with {after.job.result}"
    if before.job.state in FINAL or after.job.state in FINAL:
        return
    if len(after.drawn) < len(before.drawn) and (act != "claim" or after.job.resume != "restart" or after.drawn):
        yield f"{after.job.resume}, and {act} took what was said: {after.log}"
