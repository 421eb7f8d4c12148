"""What queue and HTTP add to the time to the first token on an idle machine, one request at a time.

    python -m benchmarks.first_token

The bare engine in this process and ``headrace up`` with one worker take turns, thirty requests each, with new prompts
of 100 token ids; before each request the machine rests. The house's time is from the first byte of the submission to
the first token on the job's event stream, by a client of few instructions: on two cores what it computes delays the
first step.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.rig import describe_machine
from benchmarks.systems import WholeSystem
from core.engine import Engine, EngineConfig
from core.models.source import resolve
from core.request import Request, SamplingParams, TokenEvent

ANSWER_TOKENS = 8


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub name")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "int8"])
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--requests", type=int, default=30, help="of each in a round (%(default)s)")
    parser.add_argument("--rest", type=float, default=0.1, help="seconds before each (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    given = parser.parse_args()
    folder, draw = resolve(given.model), random.Random(0)
    engine = Engine.load(EngineConfig(model=str(folder), dtype=given.dtype, max_running=32))
    print("| round | bare engine, median ms | over HTTP and the queue | added |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="hr-bench-") as name:
        house = WholeSystem(folder, given.dtype, Path(name))
        try:
            ways = (lambda ids: ask_engine(engine, ids), Caller(house.url).ask)
            rounds = []
            for number in range(-1, given.repeats):  # the first one warms up
                times = take_turns(ways, given, draw)
                if number >= 0:
                    rounds.append([statistics.median(each) * 1000 for each in times])
                    print(row(str(number + 1), *rounds[-1]), flush=True)
        finally:
            house.close()
    added = [house - bare for bare, house in rounds]
    print(row("median", *(statistics.median(each) for each in zip(*rounds, strict=True))))
    print(f"\nadded: {statistics.median(added):.1f} ms ({min(added):.1f} … {max(added):.1f})")
    command = " ".join(["python -m benchmarks.first_token", *sys.argv[1:]])
    print(f"{describe_machine()}, {time.strftime('%Y-%m-%d')}, `{command}`")


def take_turns(
    ways: Sequence[Callable[[list[int]], float]], given: argparse.Namespace, draw: random.Random
) -> list[list[float]]:
    """Seconds of each request, by way."""
    times: list[list[float]] = [[] for _ in ways]
    for way, taken in zip(ways, times, strict=True):
        for _ in range(given.requests):
            time.sleep(given.rest)
            taken.append(way([draw.randrange(1_000, 20_000) for _ in range(given.prompt_tokens)]))
    return times


def ask_engine(engine: Engine, ids: Sequence[int]) -> float:
    """Seconds to the first token."""
    params = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    start, first = time.perf_counter(), 0.0
    engine.add("bench", Request(token_ids=tuple(ids), params=params))
    while not engine.idle:
        said = any(isinstance(event, TokenEvent) for event in engine.step())
        first = first or said * (time.perf_counter() - start)
    return first


class Caller:
    """A client that submits over one connection and reads events over another."""

    def __init__(self, url: str) -> None:
        host = url.removeprefix("http://")
        self._submitting, self._reading = http.client.HTTPConnection(host), http.client.HTTPConnection(host)
        self._draw = random.Random(1)

    def ask(self, ids: list[int]) -> float:
        """Seconds to the first token."""
        path = f"/v1/jobs/job_{self._draw.getrandbits(128):032x}"
        params = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
        body = json.dumps({"kind": "generate", "input": {"prompt_token_ids": ids}, "params": params})
        start, first = time.perf_counter(), 0.0
        self._submitting.request("PUT", path, body, {"Content-Type": "application/json"})
        accepted = self._submitting.getresponse()
        if accepted.read() and accepted.status not in (200, 202):
            raise SystemExit(f"the submission was answered {accepted.status}")
        self._reading.request("GET", f"{path}/events")
        stream = self._reading.getresponse()
        while line := stream.readline():
            first = first or line.startswith(b"event: token") * (time.perf_counter() - start)
        return first


def row(name: str, bare: float, house: float) -> str:
    """One line of the table."""
    return f"| {name} | {bare:.1f} | {house:.1f} | {house - bare:.1f} |"


if __name__ == "__main__":
    main()
