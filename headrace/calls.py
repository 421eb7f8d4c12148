"""Every call of the HTTP API as a value: what to send and how to read the answer. Pure: sends nothing.

``headrace.client`` has two thin runners for these, one that blocks and one that awaits.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar
from urllib.parse import quote

from headrace.answers import Event, Job, JobPage

T = TypeVar("T")
Asked: TypeAlias = str | Sequence[Mapping[str, str]] | Mapping[str, Any]  #: a prompt, messages, or a whole body

DEFAULT_URL = "http://127.0.0.1:8000"
LONGEST_WAIT_SECONDS = 30.0  #: of one request; longer waits are several
PATIENCE_SECONDS = 10.0  #: for the answer itself, on top of what the server was asked to wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One HTTP request. Each may be sent again: creating is a PUT with an id of our own."""

    method: str
    path: str
    read: Callable[[Any], T]  #: of the answer's JSON
    body: Any = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = PATIENCE_SECONDS


def new_job_id() -> str:
    """An id that nobody else has."""
    return f"job_{uuid.uuid4().hex}"


def body_of(asked: Asked, *, priority: int | None = None, **params: Any) -> dict[str, Any]:
    """The body of a job: from a prompt, a chat, or a whole body whose ``params`` the given ones replace.

    Args:
        asked: text (continued as it stands), messages (``[{"role", "content"}]``), or ``{"kind", "input", …}``.
        priority: goes before one that the whole body holds; None leaves that as it is.
        params: sampling parameters; those that are None are left out.
    """
    if isinstance(asked, str):
        body: dict[str, Any] = {"kind": "generate", "input": {"prompt": asked}}
    elif isinstance(asked, Mapping):
        body = {"kind": "generate", **asked}
    else:
        body = {"kind": "generate", "input": {"messages": [dict(message) for message in asked]}}
    if priority is not None:
        body = {**body, "priority": priority}
    given = {name: value for name, value in params.items() if value is not None}
    merged = {**body.get("params", {}), **given}
    return {**body, "params": merged} if merged else body


def submit(job_id: str, body: Mapping[str, Any], wait: float) -> Call[Job]:
    """Create the job, or get it if it is there already; wait up to so many seconds for its end."""
    headers = {"Prefer": f"wait={wait:g}"} if wait else {"Prefer": "respond-async"}
    return Call(method="PUT", path=_job(job_id), read=Job, body=body, headers=headers, timeout=PATIENCE_SECONDS + wait)


def get(job_id: str, wait: float = 0) -> Call[Job]:
    """The job now, or at its end where that comes within so many seconds."""
    query = {"wait": f"{wait:g}"} if wait else {}
    return Call(method="GET", path=_job(job_id), read=Job, query=query, timeout=PATIENCE_SECONDS + wait)


def cancel(job_id: str) -> Call[Job]:
    return Call(method="POST", path=f"{_job(job_id)}/cancel", read=Job)


def retry(job_id: str) -> Call[Job]:
    return Call(method="POST", path=f"{_job(job_id)}/retry", read=Job)


def resend(job_id: str) -> Call[Job]:
    """Tell the job's webhook of its end again."""
    return Call(method="POST", path=f"{_job(job_id)}/webhook/resend", read=Job)


def delete(job_id: str) -> Call[None]:
    return Call(method="DELETE", path=_job(job_id), read=lambda _: None)


def jobs(*, status: str | None, kind: str | None, after: str | None, limit: int) -> Call[JobPage]:
    """A page of jobs, newest first."""
    asked = {"status": status, "kind": kind, "after": after, "limit": str(limit)}
    return Call(method="GET", path="/v1/jobs", read=_page, query={k: v for k, v in asked.items() if v is not None})


def dead_letters(*, after: str | None, limit: int) -> Call[JobPage]:
    """A page of dead letters, the last to die first."""
    query = {"limit": str(limit), **({"after": after} if after else {})}
    return Call(method="GET", path="/v1/dead-letters", read=_page, query=query)


def retry_dead_letters(ids: Sequence[str] | None) -> Call[dict[str, Any]]:
    """Queue these, or all of them, again: ``ids``, those ``skipped``, and whether it ``has_more``."""
    body = None if ids is None else {"ids": list(ids)}
    return Call(method="POST", path="/v1/dead-letters/retry", read=dict, body=body)


def purge_dead_letters() -> Call[dict[str, Any]]:
    """Forget all of them: how many were ``deleted``, and whether it ``has_more``."""
    return Call(method="DELETE", path="/v1/dead-letters", read=dict)


def models() -> Call[list[dict[str, Any]]]:
    return Call(method="GET", path="/v1/models", read=_entries)


def workers() -> Call[list[dict[str, Any]]]:
    return Call(method="GET", path="/v1/workers", read=_entries)


def ready() -> Call[dict[str, Any]]:
    """Whether the server can take jobs, and what it promises about them."""
    return Call(method="GET", path="/ready", read=dict)


def events_path(job_id: str) -> str:
    return f"{_job(job_id)}/events"


def read_event(number: str, kind: str, fields: Any) -> Event:
    """An event from the fields of the stream."""
    return Event(number=int(number), type=kind, fields=fields)


def _job(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _page(body: Any) -> JobPage:
    return JobPage(jobs=tuple(Job(one) for one in body["data"]), has_more=bool(body["has_more"]))


def _entries(body: Any) -> list[dict[str, Any]]:
    return list(body["data"])
