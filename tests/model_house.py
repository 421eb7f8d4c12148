"""What must hold of the house after every step of the model test: its workers, its counts, who is woken."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from jobs import keys
from jobs.job import JobState
from tests.jobs_world import CARD, OTHER
from tests.model_judge import View
from tests.model_look import House

S = JobState
#: Two compute alike, one otherwise: what it may go on with, a job's resume policy and its readers decide.
CARDS = {"w": CARD, "v": CARD, "u": dataclasses.replace(CARD, dtype="bfloat16"), "o": OTHER}
MOST_TOKENS = 16  #: that wake somebody, in one list


def judge_workers(house: House, views: Mapping[str, View], touched: Collection[str]) -> Iterator[str]:
    """Every worker lives between two acts, and holds what it runs."""
    found = {*house.leases}, {key.removeprefix(keys.CARD) for key in house.cards}
    if found != (set(CARDS), set(CARDS)) or house.marks:
        yield f"leases {found[0]}, cards {found[1]}, marks {house.marks}"
    for key, members in house.held.items():
        for job_id, attempt in (member.rsplit(":", 1) for member in members):
            view = views.get(job_id)
            runs = view and view.job.state is S.RUNNING and view.job.attempt == int(attempt)
            if job_id not in touched and not (runs and key == f"{keys.HELD}{view and view.job.worker}"):
                yield f"{key} has attempt {attempt} of {job_id}"


def judge_wakes(house: House, views: Mapping[str, View], touched: Collection[str]) -> Iterator[str]:
    """Whoever waits has woken somebody, and tokens do not pile up."""
    for job_id, view in views.items():
        for key, _ in view.facts.lists if view.job.state is S.QUEUED and job_id not in touched else ():
            kind = key.replace(keys.SUSPECTS, keys.READY).partition(".")[2].removeprefix("like.")
            if (f"{keys.WAKE}.{kind}" if kind else keys.WAKE) not in house.wakes:
                yield f"{job_id}: waits in {key}, and wakes nobody"
    if any(tokens > MOST_TOKENS for tokens in house.wakes.values()):
        yield f"tokens pile up: {house.wakes}"


def judge_counts(
    old: House,
    new: House,
    before: Mapping[str, View],
    after: Mapping[str, View],
    touched: Collection[str],
    credit: int,
) -> Iterator[str]:
    """Who succeeded or failed counts for the speed, once, and nobody else but ``credit``."""
    ended = {
        job_id
        for job_id, view in after.items()
        if view.job.state in (S.SUCCEEDED, S.FAILED)
        and not (job_id in before and before[job_id].job.state is view.job.state)
    }
    perhaps = (ended & {*touched}) | (set(before) - set(after))  # by stock RQ, or kept for no time
    counted = new.ended - old.ended - credit
    if not len(ended - {*touched}) <= counted <= len(ended | perhaps):
        yield f"{sorted(ended)} ended, {sorted(set(before) - set(after))} are gone, and {counted} count"
    if new.counts_stay:
        yield "a count stays for ever"


def judge_positions(old: House, new: House, before: Mapping[str, View], after: Mapping[str, View]) -> Iterator[str]:
    """Whoever leaves the queue passes once, with the ticket that the hash then has no more."""
    drifts = [
        house.tickets - house.passed - sum(view.number("ticket") > 0 for view in views.values())
        for house, views in ((old, before), (new, after))
    ]
    waiting = any(view.job.state is S.QUEUED and view.number("ticket") for view in after.values())
    if drifts[0] != drifts[1] and (waiting or new.passed != new.tickets):  # which a claim that leaves nobody makes so
        yield f"{new.passed} of {new.tickets} passed, by {drifts[1] - drifts[0]} too few"
