"""``dead``: the jobs that were running each time their worker died: list, explain, retry, purge."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from headrace.answers import Job
from headrace.settings import SettingError
from headrace.verbs.verb import CLIENT_SETTINGS, OK, Invocation, Verb

AT_ONCE = 1_000  #: ids that the server takes in one body


def dead(invocation: Invocation) -> int:
    """Do one of the four."""
    return ACTIONS[invocation.arguments.action](invocation)


def _list(invocation: Invocation) -> int:
    _refuse_ids(invocation)
    arguments = invocation.arguments
    with invocation.client() as client:
        page = client.dead_letters(after=arguments.after, limit=arguments.limit)
    for job in page.jobs:
        invocation.print(job.wire, f"{job.id} {_moment(job.wire.get('finished_at'))}: {job.error_message}")
    if page.has_more and page.jobs:
        invocation.note(f"there are more: headrace dead list --after {page.jobs[-1].id}")
    return OK


def _explain(invocation: Invocation) -> int:
    with invocation.client() as client:
        for job_id in invocation.ids():
            job = client.get(job_id)
            invocation.print(job.wire, "\n".join(_why(job)))
    return OK


def _retry(invocation: Invocation) -> int:
    arguments = invocation.arguments
    if arguments.all == bool(arguments.ids):
        raise SettingError("give ids, or --all")
    ids = None if arguments.all else list(invocation.ids())
    retried: list[str] = []
    skipped: list[str] = []
    more = True
    with invocation.client() as client:
        while more:
            answer = client.retry_dead_letters(None if ids is None else ids[:AT_ONCE])
            retried += answer["ids"]
            skipped += answer["skipped"]
            ids = None if ids is None else ids[AT_ONCE:]
            more = bool(answer["has_more"] if ids is None else ids)
    lines = [*retried, *(f"{job_id}: no dead letter" for job_id in skipped)]
    invocation.print({"retried": len(retried), "ids": retried, "skipped": skipped}, "\n".join(lines))
    invocation.note(f"{len(retried)} queued again; each runs alone, with one more chance")
    return OK


def _purge(invocation: Invocation) -> int:
    _refuse_ids(invocation)
    if not invocation.arguments.yes:
        _ask(invocation)
    deleted, more = 0, True
    with invocation.client() as client:
        while more:
            answer = client.purge_dead_letters()
            deleted += answer["deleted"]
            more = answer["has_more"]
    invocation.print({"deleted": deleted}, f"{deleted} forgotten")
    return OK


def _ask(invocation: Invocation) -> None:
    """Raise SettingError unless a person at a terminal says yes."""
    if invocation.json or not sys.stdin.isatty():
        raise SettingError("dead purge forgets them for good: say --yes")
    if input("Forget all dead letters, with their requests and events? [y/N] ").strip().lower() not in ("y", "yes"):
        raise SettingError("nothing was forgotten")


def _why(job: Job) -> Iterable[str]:
    yield f"{job.id} {job.status}, {job.attempt} attempts: {job.error_message or job.reason or 'no reason given'}"
    for death in job.wire.get("deaths") or ():
        yield f"  {_death(death)}"


def _death(death: Mapping[str, Any]) -> str:
    """One death of a worker in words; an older server may leave facts out."""
    neighbours = death.get("neighbours")
    beside = "" if neighbours is None else ", alone" if not neighbours else f", beside {neighbours} others"
    return (
        f"attempt {death.get('attempt')} on {death.get('worker')}, {_moment(death.get('at'))}: "
        f"{death.get('how') or 'it died'} at {death.get('tokens') or 0} tokens{beside}"
    )


def _moment(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _refuse_ids(invocation: Invocation) -> None:
    if invocation.arguments.ids:
        raise SettingError(f"dead {invocation.arguments.action} takes no id: {invocation.arguments.ids[0]}")


ACTIONS: Mapping[str, Callable[[Invocation], int]] = {
    "list": _list,
    "explain": _explain,
    "retry": _retry,
    "purge": _purge,
}


def _add(parser: argparse.ArgumentParser) -> None:
    text = "what to do: list them (the default), explain one, retry, or purge: forget all"
    parser.add_argument("action", nargs="?", default="list", choices=tuple(ACTIONS), metavar="ACTION", help=text)
    parser.add_argument("ids", metavar="ID", nargs="*", help="of explain and retry; - reads ids from standard input")
    parser.add_argument("--all", action="store_true", help="retry all of them")
    parser.add_argument("--yes", action="store_true", help="purge without asking")
    parser.add_argument("--after", metavar="ID", help="list those that died before this one")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="list at most so many (1 to 100)")


DEAD = Verb(
    name="dead",
    text="dead letters, jobs that killed their workers: list, explain ID, retry ID… or --all, purge",
    example="headrace dead retry job_5f2c…",
    settings=CLIENT_SETTINGS,
    run=dead,
    add=_add,
)
