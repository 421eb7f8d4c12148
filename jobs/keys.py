"""Every Redis key, named once; ``K.name`` stands for it in the scripts. Knows no command.

rq:...         RQ's own, exactly as RQ 3.0.0 writes them: ``rq info``, dashboards and ``Job.fetch`` read them
headrace:...   ours
…:             a prefix; an id, a name or a number follows
"""

from __future__ import annotations

from collections.abc import Mapping

from jobs.job import QUEUE

# -- RQ's
QUEUES = "rq:queues"  #: set of queue keys
READY = f"rq:queue:{QUEUE}"  #: list of ids; those of ended jobs stay until a claim drops them; + .model: wait for it
URGENT = f"rq:queue:{QUEUE}-urgent"  #: the same for jobs with a priority below 0
LOW = f"rq:queue:{QUEUE}-low"  #: … above 0
SUSPECTS = f"rq:queue:{QUEUE}.suspects"  #: list of ids that run alone first; + .model: those that name a model
JOB = "rq:job:"  #: + id: hash, RQ's fields and ours
RESULTS = "rq:results:"  #: + id: stream, one entry per ended attempt
WIP = f"rq:wip:{QUEUE}"  #: zset of id:attempt that run; its scores lie far in the future
EXECUTIONS = "rq:executions:"  #: + id: zset of the one attempt that runs
EXECUTION = "rq:execution:"  #: + id:attempt: hash
FINISHED = f"rq:finished:{QUEUE}"  #: zset of ids by expiry
FAILED = f"rq:failed:{QUEUE}"
CANCELED = f"rq:canceled:{QUEUE}"
SCHEDULED = f"rq:scheduled:{QUEUE}"  #: zset of ids by the second they are due
DEFERRED = f"rq:deferred:{QUEUE}"
SUSPENDED = "rq:suspended"  #: exists while ``rq suspend`` holds
PUBSUB = "rq:pubsub:"  #: + worker: channel of RQ's commands
RQ_WORKER = "rq:worker:"  #: + worker: hash that RQ's registration keeps
RQ_WORKERS = "rq:workers"  #: set of RQ_WORKER keys
QUEUE_WORKERS = f"rq:workers:{QUEUE}"

# -- ours
LIKE = (
    f"rq:queue:{QUEUE}.like."  #: + identity: list of ids whose answer such an engine began, and no other goes on with
)
LIKE_SUSPECTS = f"{SUSPECTS}.like."  #: + identity: the same for suspects
EVENTS = "headrace:events:"  #: + id: stream; event n is entry <n+1>-0; of an ended job they are in its hash, packed
ENDED = "headrace:ended"  #: channel on which each end is told: whoever waits for a job listens
UNPACKED = "headrace:unpacked"  #: set of ended ids whose long logs are not packed to the end yet
WAITS = "headrace:waits"  #: zset of ids in such a list by the time they fail (milliseconds)
INDEX = "headrace:index:"  #: + kind:state: zset of ids by creation (microseconds); a job is in exactly one
LEASES = "headrace:leases"  #: zset of workers by the end of their lease (milliseconds); 0: seen dead
MARKS = "headrace:marks"  #: zset of workers by the time their lease was first found over
HELD = "headrace:held:"  #: + worker: set of id:attempt it runs; instead of RQ's own such set, which expires
CARD = "headrace:worker:"  #: + worker: hash, what /v1/workers shows
MODELS = "headrace:models"  #: hash name -> card, of every model ever served
DEADLINES = "headrace:deadlines"  #: zset of queued ids by deadline (milliseconds)
RETENTION = "headrace:retention"  #: zset of ended ids by the time they are forgotten (milliseconds)
DEAD = "headrace:dead"  #: zset of dead letters' ids by the time they died (milliseconds)
WAKE = f"headrace:wake:{QUEUE}"  #: list, a token for each job that became ready; + .model: the same for one model
ARRIVALS = "headrace:arrivals"  #: channel on which each of these is told, too: busy workers listen
TICKETS = "headrace:tickets"  #: how many jobs ever joined the queue; + :urgent, :low: those of such a priority
PASSED = "headrace:passed"  #: how many of those have left it, about: ticket - passed is a position; + as above
TURNS = "headrace:turns"  #: hash model -> jobs claimed while others of another class waited, from 0 again after 20
HOLD = "headrace:hold"  #: the worker that empties itself for a suspect
WATCHERS = "headrace:watch:"  #: + random: stream that wakes one process' blocked reader
RATE = "headrace:rate:"  #: + tens of seconds: jobs that ended then
REPEATS = "headrace:repeats"  #: counts repeated submissions: WAITAOF waits for its own connection's writes only
OUTBOX = "headrace:outbox"  #: zset of callbacks by the time they are due (milliseconds)
CALLBACK = "headrace:callback:"  #: + id: hash, the record of one; outlives its job until it is delivered or given up
DELIVERIES = "headrace:deliveries"  #: hash, how many callbacks were delivered, and how many failed
DEPENDENTS = "headrace:dependents"  #: set of ended ids whose dependents RQ's own code has yet to release


def table() -> Mapping[str, str]:
    """Name in lower case -> key."""
    return {name.lower(): value for name, value in globals().items() if name.isupper() and name != "QUEUE"}
