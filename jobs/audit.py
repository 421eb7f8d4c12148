"""Is every job in exactly the one place that its state names? The oracle of the tests, and what a doctor looks at.

Each job is seen at one moment, so a running house raises no false alarm. ``audit`` looks for each job in each list;
``suspicious`` reads the lists once, which a queue of a million stands.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from core.bounds import Wire
from jobs import keys, logs
from jobs.job import FINAL, QUEUE, JobState
from jobs.runner import Runner
from jobs.scripting import Command

CHUNK = 100  #: jobs one script looks at
KEEP_SECONDS = 86_400  #: how long mended jobs are kept that do not say so themselves
SETTLED = {state.value for state in FINAL}

#: Registry of RQ's that holds a job of such a status.
REGISTRIES: Mapping[str, str] = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "failed",
    "canceled": "canceled",
}
#: Statuses of RQ's in which a job waits, and not in a list of ours.
ELSEWHERE: Mapping[str, str] = {"scheduled": "scheduled", "deferred": "deferred"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Where one job is, seen at one moment; as ``examine.lua`` tells it."""

    job: Wire
    lists: Sequence[tuple[str, int]]  #: key and how often
    places: frozenset[str]  #: names of sorted sets
    index: Sequence[str]  #: kind:state
    executions: Sequence[Wire]  #: attempt, wip, worker, held, lease
    log: Wire
    results: int  #: successful ones
    callback: Wire  #: wanted, state, waits (in the outbox)
    packed: bytes | None


def audit(client: redis.Redis) -> list[str]:
    """What is wrong with the jobs of this server: nothing, in a healthy house, at any moment."""
    return [
        f"{job_id}: {problem}" for job_id, problems in close_look(client, _every_id(client)) for problem in problems
    ]


def close_look(client: redis.Redis, job_ids: Iterable[str], *, walk: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Each job that something is wrong with, and what; jobs of other queues are nobody's business here.

    Args:
        walk: look for queued jobs in the lists, too, in time proportional to their length.
    """
    lists, runner, ids = queue_lists(client) if walk else [], Runner(client, KEEP_SECONDS), iter(job_ids)
    while chunk := list(itertools.islice(ids, CHUNK)):
        command = Command("examine", [len(lists), *lists, *chunk], list)
        for answer in runner.run(command):
            facts = _facts(answer)
            if facts.job["known"] and (facts.job["origin"] or "") not in ("", QUEUE):
                continue
            if not walk and facts.job.get("state") == JobState.QUEUED:
                continue  # it moved meanwhile
            if problems := judge(facts):
                yield facts.job["id"], problems


def suspicious(client: redis.Redis) -> Iterator[tuple[str, list[str]]]:
    """The same without walking a list for each job: who waits, and once, is found by reading the lists one time."""
    waiting, index = _waiting(client), _indexed(client)
    known = set(index.states) | set(_job_ids(client))
    queued = {job_id for job_id, state in index.states.items() if state == "queued"}
    fine = {job_id for job_id in queued if waiting.get(job_id) == 1} - set(_members(client, keys.SCHEDULED))
    odd = (queued - fine) | index.repeated | (known - set(index.states))
    odd |= {job_id for job_id in _mentioned(client) if job_id not in known}
    yield from close_look(client, sorted(odd))
    yield from close_look(client, sorted(known - fine - odd), walk=False)


def mend(client: redis.Redis, job_id: str) -> str:
    """Bring a job to the place its state names; what was done."""
    command = Command("mend", [job_id, *queue_lists(client)], bytes.decode)
    return Runner(client, KEEP_SECONDS).run(command)


def queue_lists(client: redis.Redis) -> list[str]:
    """Every list that our jobs may wait in."""
    found: Any = client.smembers(keys.QUEUES)
    own = (keys.URGENT, keys.READY, keys.LOW)
    ours = {name for key in found if (name := key.decode()).startswith(tuple(f"{each}." for each in own))}
    return sorted({*ours, *own, keys.SUSPECTS})


def judge(facts: Facts) -> list[str]:
    """What is wrong with one job."""
    if not facts.job["known"]:
        return _judge_unknown(facts)
    state = facts.job["state"]
    problems = []
    unseen = state == JobState.QUEUED and not facts.job["place"]  # put in by stock RQ, and nobody has looked at it yet
    if [place.rpartition(":")[2] for place in facts.index] != ([] if unseen else [state]):
        problems.append(f"is {state}, indexed as {list(facts.index)}")
    if state == JobState.QUEUED:
        problems += _judge_queued(facts)
    elif state == JobState.RUNNING:
        problems += _judge_running(facts)
    else:
        problems += _judge_ended(facts)
    if facts.results != (state == JobState.SUCCEEDED):
        problems.append(f"{state} with {facts.results} results")
    return problems + _judge_callback(facts) + _judge_log(facts)


def _judge_unknown(facts: Facts) -> list[str]:
    """Ids of forgotten jobs may lie in a list until a claim drops them, and in all else until the next tick."""
    if facts.job["forgotten"]:
        return []
    kept = [*facts.index, *facts.places, *(each for each in facts.executions if each["wip"])]
    return [f"has no hash, and is in {kept}"] if kept else []


def _judge_queued(facts: Facts) -> list[str]:
    status = facts.job["status"]
    places = [f"{key} × {times}" for key, times in facts.lists]
    problems = [f"queued, and attempt {each['attempt']} runs" for each in facts.executions if each["wip"]]
    if status in ELSEWHERE:
        if ELSEWHERE[status] not in facts.places or places:
            problems.append(f"{status}, and is in {places + sorted(facts.places)}")
    elif status == "queued" and (len(places) != 1 or facts.lists[0][1] != 1):
        problems.append(f"queued, and is in {places or 'no list'}")
    if status == "queued" and "scheduled" in facts.places:
        problems.append("queued, and scheduled too")
    return problems


def _judge_running(facts: Facts) -> list[str]:
    ours = [each for each in facts.executions if each["attempt"] == facts.job["attempt"]]
    if not ours or len(facts.executions) > 1:
        return [f"running attempt {facts.job['attempt']}, with executions {list(facts.executions)}"]
    [found] = ours
    problems = [f"running, and not in {name}" for name in ("wip", "held", "lease") if not found[name]]
    return problems + (["running, and scheduled"] if "scheduled" in facts.places else [])


def _judge_ended(facts: Facts) -> list[str]:
    status = facts.job["status"]
    problems = [f"{status}, and attempt {each['attempt']} runs" for each in facts.executions if each["wip"]]
    registries = sorted(facts.places & set(REGISTRIES.values()))
    if registries != [REGISTRIES[status]]:
        problems.append(f"{status}, and in RQ's registries {registries}")
    if status == "failed" and facts.job["reason"] == "poison_job" and "dead" not in facts.places:
        problems.append("a dead letter, and not among them")
    if not facts.job["closed"]:
        problems.append(f"{status}, and its log does not know")
    return problems


def _judge_callback(facts: Facts) -> list[str]:
    """Who wants to be told of an end is told of each once; a job that stock RQ moved has not been looked at yet."""
    state, waits = facts.callback.get("state"), facts.callback["waits"]
    if facts.job["state"] not in SETTLED:
        return [f"has not ended, and its callback is {state}"] if state and not facts.job["closed"] else []
    if not facts.callback["wanted"] or not facts.job["closed"]:
        return []
    if not state:
        return ["has ended, and nobody is told"]
    return [f"its callback is {state}, in the outbox: {waits}"] if waits != (state == "pending") else []


def _judge_log(facts: Facts) -> list[str]:
    events, ended, log = facts.job["events"], facts.job["state"] in SETTLED, facts.log
    problems = []
    if log["length"]:
        first, last = (int(entry.split("-")[0]) for entry in (log["first"], log["last"]))
        if log["length"] != last - first + 1 or last != events:
            problems.append(f"its log has holes: {log['length']} events from {first - 1} to {last - 1} of {events}")
    if not ended:
        if log["ended"] or facts.packed:
            problems.append("its log has ended and it has not")
        return problems
    if not facts.packed:
        return [*problems, "its log was not packed"]
    packed = list(logs.unpack_log(facts.packed, {}))
    numbers = [event.number for event in packed]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        problems.append("its packed log has holes")
    ends = [event.number for event in packed if event.type == "finished"]
    if not log["unpacked"] and ends != [events - 1]:
        problems.append(f"{facts.job['state']}, and its log of {events} finished at {ends}")
    return problems


@dataclass(frozen=True, slots=True)
class _Index:
    """What the index says: each job's state, and the jobs it has more than once."""

    states: dict[str, str]
    repeated: set[str]


def _facts(answer: Sequence[Any]) -> Facts:
    found, packed = answer
    job, lists, places, index, executions, log, results, callback = json.loads(found)
    return Facts(
        job=job,
        lists=[(key, times) for key, times in lists or ()],
        places=frozenset(places or ()),
        index=list(index or ()),
        executions=list(executions or ()),
        log=log,
        results=results,
        callback=callback,
        packed=packed,
    )


def _every_id(client: redis.Redis) -> list[str]:
    """Every job id that anything mentions."""
    return sorted({*_waiting(client), *_indexed(client).states, *_job_ids(client), *_mentioned(client)})


def _mentioned(client: redis.Redis) -> Iterator[str]:
    """Ids in what is kept beside lists, index and hashes."""
    yield from map(_job_of, _members(client, keys.WIP))
    for key in (keys.SCHEDULED, keys.FINISHED, keys.FAILED, keys.CANCELED, keys.RETENTION, keys.DEADLINES, keys.WAITS):
        yield from _members(client, key)


def _waiting(client: redis.Redis) -> dict[str, int]:
    """How often each id is in our lists."""
    found: dict[str, int] = {}
    for key in queue_lists(client):
        for start in itertools.count(0, 10_000):
            ids: Any = client.lrange(key, start, start + 9_999)
            for job_id in ids:
                found[job_id.decode()] = found.get(job_id.decode(), 0) + 1
            if len(ids) < 10_000:
                break
    return found


def _indexed(client: redis.Redis) -> _Index:
    index = _Index({}, set())
    for key in client.scan_iter(f"{keys.INDEX}*", count=1000):
        state = key.decode().rpartition(":")[2]
        for job_id in _members(client, key.decode()):
            if job_id in index.states:
                index.repeated.add(job_id)
            index.states[job_id] = state
    return index


def _members(client: redis.Redis, key: str) -> Iterator[str]:
    return (member.decode() for member, _ in client.zscan_iter(key, count=1000))


def _job_ids(client: redis.Redis) -> Iterator[str]:
    """Of every job hash; RQ keeps dependents under a longer name."""
    for key in client.scan_iter(f"{keys.JOB}*", count=1000, _type="hash"):
        yield key.decode().removeprefix(keys.JOB)


def _job_of(member: str) -> str:
    return member.rpartition(":")[0]
