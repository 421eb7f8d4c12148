"""How full the server's memory is, and when that is too full for more jobs. Knows no job and no connection.

Redis refuses every write that may need memory once it is full; ours that end jobs are exempt, a submission is not. It
is refused earlier, so that what runs still has room for its words and results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FULL_SHARE = 0.8  #: of ``maxmemory``; above it submissions are refused
MEMORY_SECONDS = 1.0  #: the server is asked at most so often: a burst may overshoot by what it sends in that time


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """The server's memory, as it counts it against its own limit."""

    used_bytes: int
    limit_bytes: int  #: ``maxmemory``; 0: there is none

    @property
    def full(self) -> bool:
        """Too full for another job."""
        return 0 < self.limit_bytes * FULL_SHARE < self.used_bytes


def read_memory(info: Mapping[str, Any]) -> MemoryReport:
    """Read the section ``memory`` of INFO; the buffers of the append-only file and of replicas do not count."""
    used = int(info["used_memory"]) - int(info.get("mem_not_counted_for_evict", 0))
    return MemoryReport(used_bytes=used, limit_bytes=int(info.get("maxmemory", 0)))


class Lately:
    """The report of at most a second ago, for one thread."""

    def __init__(self, load: Callable[[], MemoryReport], clock: Callable[[], float] = time.monotonic) -> None:
        self._load = load
        self._clock = clock
        self._kept: tuple[float, MemoryReport] | None = None  #: when it was loaded, and what

    def get(self) -> MemoryReport:
        if self._kept is None or self._clock() - self._kept[0] >= MEMORY_SECONDS:
            self._kept = (self._clock(), self._load())
        return self._kept[1]
