"""Looks on while it happens: audits of atomic snapshots, memory, number of keys."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import redis

from benchmarks.chaos.house import House
from jobs.connection import connect
from tests.conftest import Server
from tests.faults_world import Snapshots
from tests.jobs_world import audit

AUDIT_SECONDS = 1.0
MEASURE_SECONDS = 5.0
GROWTH = 1.5  #: a last quarter that is so much above the second one is a leak
QUIET_MB = 15.0  #: … unless it is so little
QUIET_KEYS = 2_000


class Watch:
    """Two threads: one audits, one measures; a server of their own holds the snapshots."""

    def __init__(self, house: House, scratch: Server) -> None:
        self.audits = 0
        self.violations: list[str] = []
        self.samples: list[dict[str, float]] = []  #: MB by room, and ``keys``
        self._house = house
        self._snapshots = Snapshots(house.redis, connect(scratch.url))
        self._stop = threading.Event()
        acts = ((self.audit, AUDIT_SECONDS), (self.measure, MEASURE_SECONDS))
        self._threads = [threading.Thread(target=self._repeat, args=act) for act in acts]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self._snapshots.scratch.close()

    def audit(self) -> None:
        """One snapshot: every job is in exactly the places its state names."""
        client = self._snapshots.take()
        self.audits += 1
        # a job that stock RQ put in is in no index before somebody looks at it
        self.violations += [problem for problem in audit(client) if "indexed as None, is queued" not in problem]

    def measure(self) -> None:
        self.samples.append({**self._house.rss_mb(), "keys": float(self._house.redis.dbsize())})

    def growth(self) -> dict[str, tuple[float, float]]:
        """Median of the second quarter and of the last one, of everything measured."""
        quarter = len(self.samples) // 4
        if not quarter:
            return {}
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        names = sorted({name for sample in self.samples for name in sample})
        return {name: (_median(early, name), _median(late, name)) for name in names}

    def leaks(self) -> list[str]:
        """What grew."""
        found = []
        for name, (early, late) in self.growth().items():
            quiet = QUIET_KEYS if name == "keys" else QUIET_MB
            if late > GROWTH * early and late - early > quiet:
                found.append(f"{name} grew from {early:.0f} to {late:.0f}")
        return found

    def _repeat(self, act: Callable[[], None], seconds: float) -> None:
        while not self._stop.wait(seconds):
            with contextlib.suppress(redis.RedisError, OSError):  # it is being killed, too
                act()


def _median(samples: list[dict[str, float]], name: str) -> float:
    values = [sample[name] for sample in samples if name in sample]
    return statistics.median(values) if values else 0.0


def save(path: Path, heading: str, lines: list[str]) -> None:
    """Replace this heading's section of a report."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Chaos\n"
    head, *sections = text.split("\n## ")
    kept = [section for section in sections if not section.startswith(f"{heading}\n")]
    mine = "\n".join([heading, "", *lines])
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n## ".join([head.rstrip() + "\n", *(each.rstrip() + "\n" for each in [*kept, mine])]), "utf-8")


def stamp() -> str:
    return time.strftime("%Y-%m-%d %H:%M")
