"""How many threads a worker may use: the cores we are allowed, divided by the workers of this host."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CGROUP = Path("/sys/fs/cgroup")


@functools.cache
def read_boot_id() -> str:
    """What this host is called by all its containers; empty where there is no such thing."""
    return _read(BOOT_ID)


def count_cores(cgroup: Path = CGROUP) -> int:
    """The cores this process may keep busy: its affinity, and the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, round(_read_quota(cgroup) or allowed)))


def share_cores(cores: int, boot_id: str, others: Iterable[str], *, least: int) -> int:
    """Threads for one worker.

    Args:
        others: the boot id of every other live worker.
        least: workers that are known to be meant for this host, whether they run already or not.
    """
    here = 1 + sum(bool(boot_id) and other == boot_id for other in others)
    return max(1, cores // max(here, least))


def _read_quota(cgroup: Path) -> float | None:
    """Cores that the container's quota allows, by cgroup version 2 or 1; None where there is none."""
    quota, _, period = (_read(cgroup / "cpu.max") or _read_version_1(cgroup)).partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _read_version_1(cgroup: Path) -> str:
    return f"{_read(cgroup / 'cpu/cpu.cfs_quota_us')} {_read(cgroup / 'cpu/cpu.cfs_period_us')}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def use_threads(threads: int) -> None:
    """Tell torch, if there is one in this process; to be called by the thread that computes."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)


class CoreShare:
    """An engine's share of the cores, while workers come and go."""

    def __init__(self, read_others: Callable[[], Iterable[str]], *, least: int, fixed: int = 0) -> None:
        """Take how to read the other live workers' boot ids.

        Args:
            fixed: threads that somebody has chosen; 0 for none.
        """
        self.threads = fixed
        self._fixed = fixed
        self._read_others = read_others
        self._least = least

    def adjust(self) -> int | None:
        """The engine's threads, where its share has changed.

        Raises:
            StoreUnavailable: who else is there cannot be told.
        """
        if self._fixed:
            return None
        threads = share_cores(count_cores(), read_boot_id(), self._read_others(), least=self._least)
        if threads == self.threads:
            return None
        self.threads = threads
        return threads
