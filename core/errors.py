"""Every error of ours, in one tree. Standard library only; knows no HTTP status (that is ``api/app.py``).

    HeadraceError
    ├── RequestError             the client's move: the request cannot be computed as it stands
    │   ├── InvalidField           a value out of its bound, of the wrong type, or missing
    │   ├── UnknownField           a name we do not know (with a suggestion where one is near)
    │   ├── PromptTooLong          no room for even one new token
    │   ├── GrammarRefused         the form asked of the answer is no grammar, or too large a one
    │   └── UnsupportedRequest     this engine cannot do that (kind, messages without a template …)
    ├── ModelError               the operator's move: the model cannot be served
    │   ├── ModelNotFound          no such folder, alias or hub name; or no worker serves it
    │   └── ModelRefused           we will not load it, and say why
    ├── JobError                 the job is not what the caller thinks
    │   ├── JobNotFound            unknown or already forgotten
    │   ├── JobConflict            the job's state does not allow that move
    │   └── JobTimeout             it ran longer than its submitter allowed
    ├── QueueFull                the client's move, later: the queue is at its bound
    ├── DeadlineUnreachable      the client's move: the queue is too long for the deadline it asked to be held to
    ├── StoreError               the operator's move: Redis
    │   ├── StoreUnavailable       it does not answer, is loading, read-only or out of memory or disk
    │   │   └── StoreRefuses         out of memory: only our own scripts may go on
    │   ├── StoreFull              its memory is nearly used up; what runs may end, nothing new comes in
    │   ├── NotDurable             written, but not confirmed on disk in time; a repeat is safe
    │   └── UnsafeServer           its configuration cannot keep the promise that was asked for
    └── EngineError              our move: a step failed
        ├── EngineChanged          another engine began the answer, and ours cannot go on with it
        ├── OutOfMemory            not even one token of the job finds memory
        └── PoisonJob              the job was running each time its worker died

Leaves carry facts as attributes and build their own message; ``code`` is the stable word a client may match.
"""

from __future__ import annotations

import math


class HeadraceError(Exception):
    """The root; catch a leaf instead."""

    code = "internal_error"
    param: str | None = None  #: the field of the request at fault, as a dotted path

    def to_wire(self) -> dict[str, str | None]:
        """The job's ``error`` object: ``{"code", "message", "param"}``."""
        return {"code": self.code, "message": str(self), "param": self.param}


class RequestError(HeadraceError):
    """The request cannot be computed as it stands; repeating it changes nothing."""

    code = "invalid_request"


class InvalidField(RequestError):
    """A value is out of its bound, of the wrong type, or missing."""

    code = "invalid_field"

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param}: {problem}")
        self.param = param


class UnknownField(RequestError):
    """A name we do not know."""

    code = "unknown_field"

    def __init__(self, param: str, suggestion: str | None = None) -> None:
        hint = f"; did you mean {suggestion!r}?" if suggestion else ""
        super().__init__(f"{param}: unknown field{hint}")
        self.param = param
        self.suggestion = suggestion


class PromptTooLong(RequestError):
    """The prompt leaves no room for even one new token."""

    code = "prompt_too_long"

    def __init__(self, tokens: int, limit: int, param: str = "input.prompt") -> None:
        super().__init__(f"{param}: {tokens} tokens; this model takes at most {limit} with room for a new one")
        self.param = param
        self.tokens = tokens
        self.limit = limit


class GrammarRefused(RequestError):
    """The form that the answer is to have is no grammar, or takes too much to follow."""

    code = "grammar_refused"
    param = "params.structured_outputs"

    def __init__(self, problem: str) -> None:
        super().__init__(f"{self.param}: {problem}")


class UnsupportedRequest(RequestError):
    """This engine cannot do what was asked."""

    code = "unsupported_request"

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param}: {problem}")
        self.param = param


class ModelError(HeadraceError):
    """The model cannot be served."""

    code = "model_error"
    param = "model"


class ModelNotFound(ModelError):
    """No such folder, alias or hub name; or no worker serves it."""

    code = "model_not_found"

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"model {name!r}: {detail}")
        self.name = name


class ModelRefused(ModelError):
    """We will not load this model, and say why."""

    code = "model_refused"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"model {name!r} is refused: {reason}")
        self.name = name
        self.reason = reason


class JobError(HeadraceError):
    """The job is not what the caller thinks."""

    code = "job_error"


class JobNotFound(JobError):
    """The id is unknown or its retention is over."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id!r}: the id is unknown or its retention is over")
        self.job_id = job_id


class JobConflict(JobError):
    """The job's state does not allow that move."""

    code = "job_conflict"

    def __init__(self, job_id: str, problem: str) -> None:
        super().__init__(f"job {job_id!r} {problem}")
        self.job_id = job_id


class JobTimeout(JobError):
    """The job ran longer than its submitter allowed (RQ's ``job_timeout``)."""

    code = "job_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the job ran longer than its timeout of {seconds:g} s")
        self.seconds = seconds


class QueueFull(HeadraceError):
    """The queue is at its bound."""

    code = "queue_full"

    def __init__(self, queued: int, limit: int, retry_after_seconds: int) -> None:
        super().__init__(f"{queued} jobs are queued and the limit is {limit}; try again in {retry_after_seconds} s")
        self.queued = queued
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds  #: honest estimate, 1 … 120


class DeadlineUnreachable(HeadraceError):
    """By the queue's own estimate the job's turn comes after its deadline, and its client asked to be told."""

    code = "deadline_unreachable"
    param = "deadline_seconds"

    def __init__(self, estimate_seconds: int, deadline_seconds: float) -> None:
        super().__init__(
            f"deadline_seconds: {deadline_seconds:g}, and the job's turn would come in about {estimate_seconds} s; "
            f"submit it without refuse_if_late, or later"
        )
        self.estimate_seconds = estimate_seconds
        self.deadline_seconds = deadline_seconds

    @property
    def retry_after_seconds(self) -> int:
        """When the queue may be short enough, if nothing else comes."""
        return math.ceil(max(self.estimate_seconds - self.deadline_seconds, 1))


class StoreError(HeadraceError):
    """Redis is not as we need it."""

    code = "store_error"


class StoreUnavailable(StoreError):
    """Redis does not answer, is loading, read-only, or out of memory or disk."""

    code = "store_unavailable"

    def __init__(self, detail: str) -> None:
        super().__init__(f"the job store is unavailable: {detail}")


class StoreRefuses(StoreUnavailable):
    """Its memory is full to the last byte: Redis refuses what needs more. Our own scripts may go on."""


class StoreFull(StoreError):
    """Its memory is nearly used up: nothing new is taken, so that what was taken can end."""

    code = "store_full"

    def __init__(self, used_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"the job store uses {used_bytes / 2**20:.1f} MiB of its {limit_bytes / 2**20:.1f} MiB, which is too full "
            f"for another job; delete ended jobs, keep them for a shorter time, or raise maxmemory"
        )
        self.used_bytes = used_bytes
        self.limit_bytes = limit_bytes


class NotDurable(StoreError):
    """The job was written but the disk did not confirm it in time; a repeat with the same id is safe."""

    code = "not_durable"

    def __init__(self, waited_seconds: float) -> None:
        super().__init__(f"the disk did not confirm the write within {waited_seconds:g} s; repeat with the same id")


class UnsafeServer(StoreError):
    """The Redis server's configuration cannot keep the durability that was asked for."""

    code = "unsafe_server"

    def __init__(self, setting: str, found: str, wanted: str) -> None:
        super().__init__(
            f'the Redis server has {setting} = {found}, and durability = "fsync" needs {wanted}; '
            f'change the server or set durability = "memory"'
        )
        self.setting = setting


class EngineError(HeadraceError):
    """A step failed through no fault of the request."""

    code = "engine_error"


class EngineChanged(EngineError):
    """Another engine began the answer, with tokens that ours does not have."""

    code = "engine_changed"

    def __init__(self, ours: str) -> None:
        super().__init__(
            f"another engine began this answer with tokens that {ours} lacks; retry the job to start it again"
        )
        self.ours = ours


class OutOfMemory(EngineError):
    """Memory does not suffice for one more token of this job, computed by itself."""

    code = "out_of_memory"

    def __init__(self) -> None:
        super().__init__(
            "the worker has too little memory for even one token of this job; "
            "lower its max_running, step_tokens or kv_memory, or the job's max_tokens"
        )


class PoisonJob(EngineError):
    """The job was running each time its worker died."""

    code = "poison_job"
