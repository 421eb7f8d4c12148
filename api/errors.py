"""What can go wrong with an HTTP request before or around its job: leaves of ``core.errors``' tree. Knows no status.

HeadraceError
├── Unauthorized        no key, or a wrong one
├── HostNotAllowed      the Host header is not ours: a page elsewhere was rebound to this address
├── OriginNotAllowed    a page of another site tried to change something
├── BodyTooLarge        more bytes than the server takes
├── MalformedBody       not JSON
├── RouteNotFound       no such path
├── MethodNotAllowed    the path does not know that method
├── IdReused            the id belongs to a job with another request
├── TooManyStreams      as many requests are held open as the process allows
├── NoWorker            nobody is there who could say what the model takes
├── StillRunning        the answer did not come within the wait
├── JobNotSucceeded     the job behind a request ended without a result
└── Unexpected          our mistake; the log has the details
"""

from __future__ import annotations

from core.bounds import Wire
from core.errors import HeadraceError


class Unauthorized(HeadraceError):
    """The key is missing or wrong."""

    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("send the key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


class HostNotAllowed(HeadraceError):
    """The Host header names somebody else."""

    code = "host_not_allowed"

    def __init__(self) -> None:
        super().__init__("without an API key this server answers only to localhost, 127.0.0.1 and [::1]")


class OriginNotAllowed(HeadraceError):
    """A page of another site tried to change something."""

    code = "origin_not_allowed"

    def __init__(self) -> None:
        super().__init__("the request comes from a page of another origin; set allow_origin to let it in")


class BodyTooLarge(HeadraceError):
    """The body has more bytes than the server takes."""

    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body must have at most {limit} bytes (max_body_bytes)")
        self.limit = limit


class MalformedBody(HeadraceError):
    """The body is not JSON."""

    code = "malformed_json"

    def __init__(self, problem: str) -> None:
        super().__init__(f"the body is not valid JSON: {problem}")


class RouteNotFound(HeadraceError):
    """No such path."""

    code = "route_not_found"

    def __init__(self) -> None:
        super().__init__("no such path; /openapi.json lists them")


class MethodNotAllowed(HeadraceError):
    """The path does not know that method."""

    code = "method_not_allowed"

    def __init__(self, allowed: str) -> None:
        super().__init__(f"this path takes {allowed or 'another method'}")
        self.allowed = allowed


class IdReused(HeadraceError):
    """The id belongs to a job with another request; repeating changes nothing."""

    code = "id_reused"
    param = "job_id"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id!r} exists with a different request; choose another id")
        self.job_id = job_id


class TooManyStreams(HeadraceError):
    """As many requests are held open as the process allows."""

    code = "too_many_streams"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} requests are held open, which is the limit (max_streams); poll, or try again")


class NoWorker(HeadraceError):
    """No worker is alive and none was seen before, so nobody knows what the model takes."""

    code = "no_worker"

    def __init__(self) -> None:
        super().__init__("no worker is alive yet; try again")


class StillRunning(HeadraceError):
    """The answer did not come within the wait; the job goes on."""

    code = "still_running"

    def __init__(self, job_id: str, seconds: float) -> None:
        super().__init__(f"job {job_id!r} has not ended within {seconds:g} s and goes on; ask at its Location")
        self.job_id = job_id


class JobNotSucceeded(HeadraceError):
    """The job behind a request ended without a result; ``code`` is the job's own."""

    code = "job_not_succeeded"

    def __init__(self, job_id: str, error: Wire) -> None:
        super().__init__(str(error["message"]))
        self.job_id = job_id
        self.code = str(error["code"])
        self.param = error.get("param")


class Unexpected(HeadraceError):
    """Our mistake."""

    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("something went wrong on our side; the server's log has it under this request id")
