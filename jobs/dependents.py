"""Jobs that wait for others, or for one of RQ's rate limits: RQ's own code releases them. Knows no script of ours."""

from __future__ import annotations

from typing import Any

import redis
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.rate_limit import release_slot
from rq.serializers import JSONSerializer

from jobs import keys
from jobs.job import QUEUE

MOST = 100  #: jobs looked at in one call


def release_dependents(client: redis.Redis) -> None:
    """Let RQ queue what waited for jobs that have ended. A job stays noted until that is done, so that a death in
    between only delays it."""
    noted: Any = client.srandmember(keys.DEPENDENTS, MOST)
    queue = Queue(QUEUE, connection=client, serializer=JSONSerializer)
    for job_id in noted:
        try:
            job = Job.fetch(job_id.decode(), connection=client, serializer=JSONSerializer)
        except NoSuchJobError:
            pass
        else:
            queue.enqueue_dependents(job)
            release_slot(job)
        client.srem(keys.DEPENDENTS, job_id)
