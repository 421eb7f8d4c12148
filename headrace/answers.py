"""What a server answers, typed: jobs and events. Whatever a newer server adds stays reachable in ``wire``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})


@dataclass(frozen=True, slots=True)
class Job:
    """A job as one answer showed it; ask again for a newer one."""

    wire: Mapping[str, Any]  #: the JSON object of the server, field by field

    @property
    def id(self) -> str:
        return str(self.wire["id"])

    @property
    def status(self) -> str:
        """``queued``, ``running``, ``succeeded``, ``failed``, ``cancelled`` or ``expired``."""
        return str(self.wire["status"])

    @property
    def ended(self) -> bool:
        return self.status in FINAL

    @property
    def succeeded(self) -> bool:
        return self.status == "succeeded"

    @property
    def attempt(self) -> int:
        return int(self.wire.get("attempt") or 0)

    @property
    def tokens_generated(self) -> int:
        return int(self.wire.get("tokens_generated") or 0)

    @property
    def priority(self) -> int:
        """The lower, the earlier."""
        return int(self.wire.get("priority") or 0)

    @property
    def queue_position(self) -> int | None:
        """An estimate; None when it is not queued or nobody knows."""
        return self.wire.get("queue_position")

    @property
    def choices(self) -> Sequence[Mapping[str, Any]]:
        """The answers; empty until there is a result."""
        return (self.wire.get("result") or {}).get("choices") or ()

    @property
    def text(self) -> str:
        """Of the first choice; empty until there is a result."""
        return str(self.choices[0]["text"]) if self.choices else ""

    @property
    def texts(self) -> list[str]:
        """Of all choices, in their order; empty until there is a result."""
        return [str(choice["text"]) for choice in self.choices]

    @property
    def token_ids(self) -> list[int]:
        """Of the first choice, or of a ``predict`` job."""
        if self.choices:
            return list(self.choices[0]["token_ids"])
        return list((self.wire.get("result") or {}).get("token_ids") or ())

    @property
    def finish_reason(self) -> str | None:
        """Of the first choice: ``stop``, ``length``, ``cancelled`` or ``deadline``; None until there is a result."""
        return str(self.choices[0]["finish_reason"]) if self.choices else None

    @property
    def usage(self) -> Mapping[str, int]:
        return (self.wire.get("result") or {}).get("usage") or {}

    @property
    def reason(self) -> str | None:
        return self.wire.get("reason")

    @property
    def webhook(self) -> Mapping[str, Any] | None:
        """Who is told of the end, how far that has got: ``url``, ``id``, ``state``, ``attempts``, ``last_error``."""
        return self.wire.get("webhook")

    @property
    def error(self) -> Mapping[str, Any] | None:
        """``{"code", "message", "param"}`` of a failed job."""
        return self.wire.get("error")

    @property
    def error_message(self) -> str:
        return str(self.error.get("message") or "") if self.error else ""


@dataclass(frozen=True, slots=True)
class Event:
    """One numbered happening of a job: ``started``, ``token``, ``progress`` or ``finished``."""

    number: int
    type: str
    fields: Mapping[str, Any]

    @property
    def index(self) -> int:
        """The choice that a ``token`` event adds to."""
        return int(self.fields.get("index") or 0)

    @property
    def text(self) -> str:
        """What a ``token`` event adds to its choice."""
        return str(self.fields.get("text") or "") if self.type == "token" else ""

    @property
    def job(self) -> Job | None:
        """The whole job, with the last event."""
        return Job(self.fields["job"]) if self.type == "finished" and "job" in self.fields else None


@dataclass(frozen=True, slots=True)
class JobPage:
    """A piece of the list of jobs, newest first."""

    jobs: tuple[Job, ...]
    has_more: bool  #: ask again with ``after`` = the last id
