"""What can go wrong for a client, in one tree.

ClientError
├── Unreachable        no server answers there
├── TimedOut           the job has not ended in the time given; it goes on
├── JobFailed          the job ended, but not with a result
└── ServerRefused      the server answered with an error: status, code, param, request id
    ├── Unauthorized     401, 403: the key is missing or wrong
    ├── NotFound         404: no such job or model
    ├── Conflict         409: the job's state does not allow that
    ├── InvalidRequest   other 4xx: ``param`` names the field
    └── Overloaded       429, 503, still so after all patience
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.answers import Job


class ClientError(Exception):
    """The root; catch a leaf instead where you can act on it."""


class Unreachable(ClientError):
    """No server answers there."""

    def __init__(self, url: str, detail: str) -> None:
        super().__init__(f"no Headrace server answers at {url}: {detail}")
        self.url = url


class TimedOut(ClientError):
    """The job has not ended in the time given; it goes on."""

    def __init__(self, job_id: str, seconds: float) -> None:
        super().__init__(f"job {job_id} has not ended within {seconds:g} s")
        self.job_id = job_id
        self.seconds = seconds


class JobFailed(ClientError):
    """The job ended, but not with a result."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id} {job.status}: {job.error_message or job.reason or 'no reason given'}")
        self.job = job


class ServerRefused(ClientError):
    """The server answered with an error."""

    def __init__(self, status: int, code: str, message: str, param: str | None, request_id: str | None) -> None:
        super().__init__(f"{message} ({status} {code})")
        self.status = status
        self.code = code  #: a stable word
        self.message = message
        self.param = param  #: the field at fault, as a dotted path
        self.request_id = request_id  #: names the line in the server's log


class Unauthorized(ServerRefused):
    """The key is missing or wrong."""


class NotFound(ServerRefused):
    """No such job or model."""


class Conflict(ServerRefused):
    """The job's state does not allow that."""


class InvalidRequest(ServerRefused):
    """The request cannot be taken as it stands; ``param`` names the field."""


class Overloaded(ServerRefused):
    """The queue is full or the store does not answer, still so after all patience."""


_BY_STATUS: Mapping[int, type[ServerRefused]] = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    409: Conflict,
    429: Overloaded,
    503: Overloaded,
}


def refusal(status: int, body: Any, request_id: str | None) -> ServerRefused:
    """The error that a status and a body (RFC 9457 and OpenAI's shape at once, or anything else) stand for."""
    table = body if isinstance(body, Mapping) else {}
    inner = table.get("error")
    fields: Mapping[str, Any] = inner if isinstance(inner, Mapping) else table
    reasons = "; ".join(map(str, table.get("reasons") or ()))  # of a server that is not ready
    message = fields.get("message") or table.get("detail") or reasons or "the server gave no reason"
    cls = _BY_STATUS.get(status, InvalidRequest if 400 <= status < 500 else ServerRefused)
    return cls(status, str(fields.get("code") or "error"), str(message), fields.get("param"), request_id)
