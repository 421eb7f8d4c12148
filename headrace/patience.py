"""When a call is sent again, and after how long. Pure: neither sleeps nor sends."""

from __future__ import annotations

import random
from dataclasses import dataclass

import httpx2

BUSY = frozenset({429, 503})
NOTHING_LEFT = 204  #: a stream's answer to who has read its last event; an empty stream says nothing of the kind
LONGEST_PAUSE_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to go on trying."""

    busy_seconds: float = 60.0  #: altogether, while the server says 429 or 503
    broken_tries: int = 3  #: after a connection that was refused or broke
    broken_pause_seconds: float = 0.2  #: doubles with each


@dataclass(slots=True, eq=False)
class Tries:
    """What one call has been through."""

    patience: Patience
    broken: int = 0
    waited: float = 0.0  #: seconds, on 429 and 503
    over: bool = False  #: the stream has nothing left

    def pause_after(self, response: httpx2.Response) -> float | None:
        """Seconds until the next try; None: the answer stands."""
        if response.headers.get("x-should-retry") == "false":
            return None  # a repeat would ask for something else: the server knows
        return self.pause_after_status(response.status_code, response.headers.get("retry-after"))

    def pause_after_status(self, status: int, retry_after: str | None) -> float | None:
        """The same, for a status and the server's own wish in seconds."""
        self.broken = 0  # it answered
        if status not in BUSY:
            return None
        pause = min(max(_seconds(retry_after), 0.05), LONGEST_PAUSE_SECONDS)
        if self.waited + pause > self.patience.busy_seconds:
            return None
        self.waited += pause
        return pause * random.uniform(1.0, 1.1)  # a crowd that was turned away together must not come back together

    def pause_after_break(self) -> float | None:
        """Seconds until the next try after a connection failed; None: give up."""
        self.broken += 1
        if self.broken > self.patience.broken_tries:
            return None
        return float(self.patience.broken_pause_seconds * 2 ** (self.broken - 1))


def _seconds(retry_after: str | None) -> float:
    try:
        return float(retry_after or 1.0)
    except ValueError:
        return 1.0
