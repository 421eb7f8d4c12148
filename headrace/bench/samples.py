"""What is known of one request of a run: when it was due, sent, answered. Seconds after the run's start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request. Every latency counts from ``due``: in an open loop, waiting for a free connection counts too."""

    due: float
    ended: float
    prompt_tokens: int = 0
    deliveries: tuple[tuple[float, int], ...] = ()  #: when tokens came, and how many at once
    error: str | None = None  #: a stable word; None: it succeeded

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.deliveries)

    @property
    def e2e(self) -> float:
        return self.ended - self.due

    @property
    def ttft(self) -> float | None:
        """To the first token; None where none came."""
        return self.deliveries[0][0] - self.due if self.deliveries else None

    @property
    def gaps(self) -> list[float]:
        """Between one delivery of tokens and the next."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.deliveries)]

    @property
    def token_seconds(self) -> float | None:
        """A token after the first, on average; None where there is no second one."""
        if self.tokens < 2:
            return None
        return (self.deliveries[-1][0] - self.deliveries[0][0]) / (self.tokens - 1)

    def to_wire(self) -> dict[str, Any]:
        """For ``--out``."""
        return {
            "due": self.due,
            "ttft": self.ttft,
            "token_seconds": self.token_seconds,
            "e2e": self.e2e,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "error": self.error,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Sample:
        """Read a line of ``python -m core.bench``."""
        deliveries = tuple((float(at), int(count)) for at, count in wire["deliveries"])
        return cls(
            due=wire["due"],
            ended=wire["ended"],
            prompt_tokens=wire["prompt_tokens"],
            deliveries=deliveries,
            error=wire["error"],
        )
