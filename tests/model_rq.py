"""What stock RQ does to jobs in the model test's walk: it knows nothing of index and log."""

from __future__ import annotations

import time

from rq import Queue, Retry
from rq.job import Job as RqJob
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from jobs import keys
from jobs.job import FINAL, JobState
from tests.jobs_world import list_of
from tests.model_walk import JOBS, World

S = JobState


def rq_enqueue(world: World) -> None:
    if len(world.ids) >= JOBS:
        return
    world.made += 1
    job_id, kind = f"j{world.made}", world.random.choice(("generate", "predict"))
    wire = {"input": {"token_ids": [1]} if kind == "predict" else {"prompt": "x"}}
    priority = world.random.choice(({}, {}, {"priority": -7}, {"priority": 5}))
    model = world.random.choice(({}, {}, {"model": "other"}, {"model": "nobody's"}))
    retry = Retry(max=2, interval=[0, 5]) if world.chance(0.3) else None
    queue = Queue("generate", connection=world.client, serializer=JSONSerializer)
    before = world.any_id(*(set(S) - {S.SUCCEEDED})) if world.chance(0.2) else None
    waits = {"depends_on": before} if before else {}
    ttl = 600 if world.chance(0.3) else None
    queue.enqueue(f"headrace.{kind}", {**wire, **model, **priority}, job_id=job_id, retry=retry, ttl=ttl, **waits)
    world.ids.append(job_id)
    world.touch(job_id)
    world.views[job_id] = world.look(job_id)


def push_twice(world: World) -> None:
    """RQ queues what waits, runs or has ended: most often what waits for its like, where the next claim may find it."""
    waiting = [job_id for job_id in world.ids if "waiting_for" in world.views[job_id].fields]
    if job_id := world.random.choice(waiting) if waiting else world.any_id(*(set(S) - {S.QUEUED})):
        push = world.random.choice((world.client.rpush, world.client.lpush))
        push(world.random.choice((keys.READY, list_of(world.views[job_id].job.priority))), job_id)
        world.pushed.add(job_id)


def rq_cancel(world: World) -> None:
    """It ends what we noted things about; when it ended is RQ's to say. RQ would cancel what has ended, too."""
    noted = [
        job_id for job_id, view in world.views.items()
        if view.job.state not in FINAL and ("waiting_for" in view.fields or view.job.cancel_requested)
    ]  # fmt: skip
    if job_id := world.random.choice(noted) if noted else world.any_id(S.QUEUED, S.RUNNING):
        world.touch(job_id)
        told = world.random.choice(("", "2026-01-02T03:04:05.000006Z"))
        world.client.hset(f"{keys.JOB}{job_id}", "ended_at", told)
        _rq_job(world, job_id).cancel()
        if "closed" not in world.seen(job_id).fields:  # it ended before, and RQ queued it again: nobody is to note it
            world.store.get(job_id)
            ended = world.look(job_id).fields["ended_at"]
            assert ended == told if told else ended, f"ended at {ended}, and RQ said {told}"


def rq_requeue(world: World) -> None:
    if job_id := world.any_id(S.FAILED) if world.chance(0.5) else world.any_id():
        world.touch(job_id)
        _rq_job(world, job_id).requeue()
        if world.chance(0.4):  # its old end is noted still
            world.client.zadd(keys.RETENTION, {job_id: 1})
            world.store.expire()
            assert world.client.ttl(f"{keys.JOB}{job_id}") == -1, f"{job_id} waits, and will be forgotten"


def rq_clean(world: World) -> None:
    """A dashboard on a fast clock."""
    StartedJobRegistry("generate", connection=world.client, serializer=JSONSerializer).cleanup(time.time() + 9_999)


def _rq_job(world: World, job_id: str) -> RqJob:
    return RqJob.fetch(job_id, connection=world.client, serializer=JSONSerializer)
