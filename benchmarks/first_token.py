"""What queue and HTTP add to the time to the first token on an idle machine, one request at a time.

    python -m benchmarks.first_token --repeats 5

``headrace bench --concurrency 1`` over HTTP (``headrace up``, one worker, an event stream for each job) and
``--in-process`` (the bare engine) take turns, with the same prompts of 100 token ids. Prints the medians of each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rig import describe_machine
from benchmarks.systems import WholeSystem
from core.models.source import resolve

LOAD = ["--concurrency", "1", "--prompt-tokens", "100", "--max-tokens", "8", "--json"]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub name")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "int8"])
    parser.add_argument("--requests", type=int, default=30, help="of each in a round (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    folder = resolve(given.model)
    engine = ["--in-process", "--model", str(folder), "--dtype", given.dtype]
    rounds: list[tuple[float, float]] = []
    print("| round | bare engine, median ms | over HTTP and the queue | added |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="hr-bench-") as name:
        house = WholeSystem(folder, given.dtype, Path(name))
        try:
            measure(["--url", house.url], 5, 0)
            for number in range(given.repeats):
                seed = number + 1
                bare = measure(engine, given.requests, seed)
                rounds.append((bare, measure(["--url", house.url], given.requests, seed)))
                print(row(str(number + 1), *rounds[-1]), flush=True)
        finally:
            house.close()
    print(row("median", *(statistics.median(each) for each in zip(*rounds, strict=True))))
    command = " ".join(["python -m benchmarks.first_token", *sys.argv[1:]])
    print(f"\n{describe_machine()}, {time.strftime('%Y-%m-%d')}, `{command}`")


def measure(whom: list[str], requests: int, seed: int) -> float:
    """Median milliseconds to the first token."""
    load = [*LOAD, "--requests", str(requests), "--seed", str(seed)]
    command = [sys.executable, "-m", "headrace", "bench", *load, *whom]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout)["ttft_seconds"]["p50"]) * 1000


def row(name: str, bare: float, house: float) -> str:
    """One line of the table."""
    return f"| {name} | {bare:.1f} | {house:.1f} | {house - bare:.1f} |"


if __name__ == "__main__":
    main()
