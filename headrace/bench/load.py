"""What is asked, how much of it and when: bodies, and arrivals of an open or a closed loop. Pure; sends nothing."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BODIES = 1_000  #: different ones at most; a longer run asks them again in the same order
MOST_REQUESTS = 1_000_000
LONGEST = 1_000_000  #: tokens
_LENGTHS = re.compile(r"(\d+)(?:,([0-9.]+),(\d+),(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Token counts: lognormal around a median and clipped, or always the median.

    Raises:
        ValueError: saying what is wrong with which value.
    """

    median: int
    sigma: float = 0.0
    low: int = 1
    high: int = LONGEST

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.median <= self.high <= LONGEST:
            raise ValueError(f"1 <= LOW <= MEDIAN <= HIGH <= {LONGEST} must hold")
        if not 0 <= self.sigma <= 5:
            raise ValueError(f"SIGMA must be from 0 to 5, not {self.sigma:g}")

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """``100``, or ``100,0.7,16,512``: median, sigma, lowest, highest."""
        if not (found := _LENGTHS.fullmatch(text)):
            raise ValueError("must be N, or MEDIAN,SIGMA,LOW,HIGH")
        median, sigma, low, high = found.groups()
        if sigma is None:
            return cls(median=int(median))
        return cls(median=int(median), sigma=float(sigma), low=int(low), high=int(high))

    def draw(self, source: random.Random) -> int:
        if not self.sigma:
            return self.median
        return min(self.high, max(self.low, round(source.lognormvariate(math.log(self.median), self.sigma))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """All that a driver has to know. Exactly one of ``concurrency`` and ``due`` is given."""

    bodies: Sequence[Mapping[str, Any]]  #: request n has the body n modulo their number
    requests: int  #: at most so many
    concurrency: int | None = None  #: closed loop: so many callers, each asks again when its answer is complete
    due: Sequence[float] | None = None  #: open loop: seconds after the start at which each is sent, come what may
    seconds: float = math.inf  #: nothing is sent later than this after the start; what runs is waited for

    def body(self, number: int) -> Mapping[str, Any]:
        return self.bodies[number % len(self.bodies)]

    def to_wire(self) -> dict[str, Any]:
        """For ``python -m core.bench``."""
        seconds = None if math.isinf(self.seconds) else self.seconds
        return {
            "bodies": list(self.bodies),
            "requests": self.requests,
            "concurrency": self.concurrency,
            "due": None if self.due is None else list(self.due),
            "seconds": seconds,
        }


def synthetic_bodies(count: int, prompt: Lengths, answer: Lengths, *, vocab_size: int, seed: int) -> list[Any]:
    """Generate jobs: prompts of random token ids, greedy answers of exactly the drawn lengths."""
    source = random.Random(seed)
    bodies = []
    for _ in range(min(count, BODIES)):
        length, tokens = prompt.draw(source), answer.draw(source)
        ids = [source.randrange(vocab_size) for _ in range(length)]
        params = {"max_tokens": tokens, "ignore_eos": True}
        bodies.append({"kind": "generate", "input": {"prompt_token_ids": ids}, "params": params})
    return bodies


def poisson_arrivals(rate: float, requests: int, seconds: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process: gaps drawn from the exponential distribution.

    Args:
        rate: of requests a second, on average.
        requests: at most so many.
        seconds: none comes later.
    """
    source = random.Random(seed)
    due: list[float] = []
    now = source.expovariate(rate)
    while len(due) < requests and now < seconds:
        due.append(now)
        now += source.expovariate(rate)
    return due
