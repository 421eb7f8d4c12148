"""What the benchmarks that start real workers share: a worker's process, and the machine in words."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jobs.reports import WorkerCard
from jobs.store import Store

ROOT = Path(__file__).parent.parent


def describe_machine() -> str:
    """Cores and processor."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} cores of {name}"


def start_worker(
    url: str, name: str, *, python: object = sys.executable, **settings: object
) -> subprocess.Popen[bytes]:
    """A worker's parent; its processes are called after it. Only what it warns of is shown."""
    ours = {f"HEADRACE_{key.upper()}": str(value) for key, value in {"log_level": "warning", **settings}.items()}
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_") or key.endswith("_CACHE")
    }
    environment = {**kept, **ours, "HEADRACE_REDIS_URL": url, "HEADRACE_WORKER_NAME": name, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([str(python), "-P", "-m", "worker"], env=environment)


@contextmanager
def running_workers(
    url: str, count: int, *, python: object = sys.executable, **settings: object
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many workers, stopped at the end, whichever they are by then."""
    processes = [start_worker(url, f"bench{number}", python=python, **settings) for number in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()


def find(store: Store, name: str) -> WorkerCard | None:
    """The live worker of that name."""
    return next((card for card in store.workers() if card.name.startswith(f"{name}-")), None)


def await_it(read: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """What ``read`` gives, once it gives something true."""
    deadline = time.monotonic() + seconds
    while not (found := read()):
        if time.monotonic() > deadline:
            raise SystemExit(f"no {what} within {seconds:g} s")
        time.sleep(0.02)
    return found
