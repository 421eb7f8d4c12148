"""What rolling a worker costs: finished tokens a second before, while and after one of three is stopped and started.

    python -m benchmarks.rolling

Three workers with the instant engine (a step takes 5 ms), always enough jobs queued, a Valkey of its own. One worker is
told to stop, is gone for a few seconds, and starts again. Counted are the tokens of jobs that Redis has as finished.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable

from benchmarks.queue_depth import serving
from benchmarks.rig import await_it, describe_machine, find, running_workers, start_worker
from core.request import Request, SamplingParams
from jobs import commands, keys
from jobs.connection import connect
from jobs.job import NewJob
from jobs.memory import MemoryReport
from jobs.runner import Runner
from jobs.settings import StoreSettings
from jobs.store import Store

WORKERS, ROWS, STEP_MS, TOKENS = 3, 4, 5, 20  #: a job takes a tenth of a second
AHEAD = 400  #: jobs that wait at any time
PHASE_SECONDS = 8
SETTLE_SECONDS = 2  #: after a change, before it is counted again
numbers = itertools.count()


class Meter:
    """Counts once a second, in a thread of its own."""

    def __init__(self, read: Callable[[], int]) -> None:
        self.rates: list[float] = []
        self._read = read
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        before, at = self._read(), time.monotonic()
        while not self._ended.wait(1 - (time.monotonic() - at)):
            now, count = time.monotonic(), self._read()
            self.rates.append((count - before) / (now - at))
            before, at = count, now

    def phase(self) -> list[float]:
        """Tokens a second in each of the next seconds."""
        time.sleep(SETTLE_SECONDS)
        first = len(self.rates)
        await_it(lambda: len(self.rates) >= first + PHASE_SECONDS, "figures")
        return self.rates[first : first + PHASE_SECONDS]

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


def main() -> None:
    """Measure, and print the three phases."""
    settings = {"engine": "instant", "instant_step_ms": STEP_MS, "max_running": ROWS}
    with serving() as url:
        feeding = threading.Event()
        feeder = threading.Thread(target=feed, args=(url, feeding))
        with running_workers(url, WORKERS, **settings) as processes:
            feeder.start()
            try:
                report(roll(url, processes, settings))
            finally:
                feeding.set()
                feeder.join()


def roll(url: str, processes: list[subprocess.Popen[bytes]], settings: dict[str, object]) -> dict[str, list[float]]:
    """Finished tokens a second, by phase."""
    store = Store(StoreSettings(redis_url=url))
    await_it(lambda: len(store.workers()) == WORKERS, "workers")
    client = connect(url)
    meter = Meter(lambda: int(client.zcard(keys.FINISHED)) * TOKENS)
    try:
        phases = {"before": meter.phase()}
        told = time.monotonic()
        processes[0].terminate()
        code = processes[0].wait(30)
        print(f"worker 1 was told to stop and ended with exit code {code} after {time.monotonic() - told:.2f} s")
        phases["one is away"] = meter.phase()
        processes[0] = start_worker(url, "back", **settings)
        await_it(lambda: find(store, "back"), "worker")
        phases["after"] = meter.phase()
        crashed = [job.id for job in store.list(limit=100) if job.crashes or job.attempt > 1]
        print(f"jobs that crashed or were begun twice among the newest 100: {len(crashed)}")
    finally:
        meter.close()
        store.close()
    return phases


def feed(url: str, ended: threading.Event) -> None:
    """Keep the queue full."""
    settings = StoreSettings(redis_url=url)
    store, runner = Store(settings), Runner(connect(url), settings.result_ttl_seconds)
    while not ended.wait(0.1):
        missing = AHEAD - store.queue().queued
        new = [commands.submit(make(), settings, MemoryReport(used_bytes=0, limit_bytes=0)) for _ in range(missing)]
        if new:
            runner.answers(new)
    store.close()


def make() -> NewJob:
    request = Request(prompt="Once upon a time", params=SamplingParams(max_tokens=TOKENS))
    return NewJob(id=f"job_{next(numbers):032x}", request=request)


def report(phases: dict[str, list[float]]) -> None:
    """The table, and what is left of the throughput beside what the rest's share is."""
    print("\n| phase | tokens/s, mean | each second |\n|---|---|---|")
    for name, rates in phases.items():
        print(f"| {name} | {statistics.fmean(rates):.0f} | {', '.join(f'{rate:.0f}' for rate in rates)} |")
    before, away, after = (statistics.fmean(rates) for rates in phases.values())
    share = (WORKERS - 1) / WORKERS
    print(f"\naway/before: {away / before:.3f} (the others' share is {share:.3f}); after/before: {after / before:.3f}")
    print(f"{describe_machine()}, {time.strftime('%Y-%m-%d')}, `python -m benchmarks.rolling`")


if __name__ == "__main__":
    main()
