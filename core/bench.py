"""Drives a load through an engine in this process: a plan in, what happened out, a line each. Knows no statistics.

    python -m core.bench --model smollm2-135m < plan.json

Says ``{"card": …}`` once the engine is loaded, reads the plan (one line: bodies, requests, concurrency or due times,
seconds), says a line for each request that ended, then ``{"ended": true}``. ``headrace bench --in-process`` starts it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from core.bounds import Wire
from core.errors import HeadraceError, RequestError
from core.instant import InstantConfig, InstantEngine
from core.protocol import EngineProtocol
from core.request import FailedEvent, FinishedEvent, Request, TokenEvent
from core.threads import keep_calm

BAD_CONFIGURATION = 2
NAP_SECONDS = 0.05  #: the longest sleep while nothing is due


@dataclass(slots=True, eq=False)
class Asked:
    """A request on its way. Seconds after the start."""

    due: float
    deliveries: list[tuple[float, int]] = field(default_factory=list)  #: when tokens came, and how many

    def to_wire(self, now: float, *, prompt_tokens: int = 0, error: str | None = None) -> Wire:
        return {
            "due": self.due,
            "ended": now,
            "prompt_tokens": prompt_tokens,
            "deliveries": self.deliveries,
            "error": error,
        }


class Drive:
    """One run of a plan; ``say`` is called with each request that has ended."""

    def __init__(
        self,
        engine: EngineProtocol,
        plan: Wire,
        say: Callable[[Wire], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._engine = engine
        self._bodies = plan["bodies"]
        self._concurrency: int | None = plan["concurrency"]
        self._due: deque[float] = deque(plan["due"] or ())
        self._left: int = plan["requests"]
        self._seconds: float = math.inf if plan["seconds"] is None else plan["seconds"]
        self._say = say
        self._clock, self._sleep = clock, sleep
        self._start = clock()
        self._numbers: Iterator[int] = itertools.count()
        self._asked: dict[str, Asked] = {}

    def run(self) -> None:
        """Until everything that is to be sent was sent and has ended."""
        while self._more or self._asked:
            for due in self._arrivals():
                self._send(due)
            if self._engine.idle:
                self._wait()
            else:
                self._report()

    @property
    def _more(self) -> bool:
        return bool(self._due) if self._concurrency is None else self._left > 0 and self._now() < self._seconds

    def _arrivals(self) -> Iterator[float]:
        """When those were due that the engine is given now; what it has no room for stays due."""
        while self._more and self._engine.room > 0:
            if self._concurrency is None:
                if self._due[0] > self._now():
                    return
                yield self._due.popleft()
            else:
                if len(self._asked) >= self._concurrency:
                    return
                self._left -= 1
                yield self._now()

    def _send(self, due: float) -> None:
        number = next(self._numbers)
        asked = Asked(due)
        try:
            self._engine.add(str(number), Request.from_wire(self._bodies[number % len(self._bodies)]))
        except RequestError as error:
            self._say(asked.to_wire(self._now(), error=error.code))
            return
        self._asked[str(number)] = asked

    def _report(self) -> None:
        events = self._engine.step()
        now = self._now()
        for event in events:
            if isinstance(event, TokenEvent):
                self._asked[event.job_id].deliveries.append((now, len(event.token_ids)))
            elif isinstance(event, FinishedEvent):
                tokens = event.result.usage.prompt_tokens
                self._say(self._asked.pop(event.job_id).to_wire(now, prompt_tokens=tokens))
            elif isinstance(event, FailedEvent):
                code = getattr(event.error, "code", type(event.error).__name__)
                self._say(self._asked.pop(event.job_id).to_wire(now, error=str(code)))

    def _wait(self) -> None:
        if self._concurrency is None and self._due:
            self._sleep(min(NAP_SECONDS, max(0.0, self._due[0] - self._now())))

    def _now(self) -> float:
        return self._clock() - self._start


def main() -> int:
    """Load, read the plan, run it."""
    given = _parser().parse_args()
    try:
        engine = _load(given)
    except (HeadraceError, ValueError) as error:
        print(f"core.bench: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    _print({"card": engine.card.to_wire()})
    plan = json.loads(sys.stdin.readline())
    Drive(engine, plan, _print).run()
    _print({"ended": True})
    return 0


def _load(given: argparse.Namespace) -> EngineProtocol:
    if given.engine == "instant":
        seconds = given.instant_step_ms / 1000
        return InstantEngine(InstantConfig(step_seconds=seconds, max_running=given.max_running))
    keep_calm(given.dtype, os.environ)
    from core.engine import Engine, EngineConfig

    words = ("model", "revision", "dtype", "kv_dtype", "device", "kv_memory")
    names = (*words, "max_model_len", "max_running", "step_tokens")
    options = {name: getattr(given, name) for name in names}
    token = os.environ.get("HEADRACE_HF_TOKEN") or os.environ.get("HF_TOKEN", "")
    return Engine.load(EngineConfig(**options, threads=given.threads, hf_token=token))


def _print(wire: Any) -> None:
    print(json.dumps(wire), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m core.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", default="torch", choices=("torch", "instant"))
    for name, default in (("model", "smollm2-135m"), ("revision", "")):
        parser.add_argument(f"--{name}", default=default)
    for name in ("dtype", "kv-dtype", "device"):
        parser.add_argument(f"--{name}", default="auto")
    parser.add_argument("--kv-memory", default="auto")
    for name, number in (("max-model-len", 0), ("max-running", 32), ("step-tokens", 256), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--instant-step-ms", type=float, default=0.0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
