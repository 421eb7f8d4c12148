"""The faults: what each does to a house, which jobs it touches, and how long until they go on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import httpx2
import redis

from benchmarks.chaos.house import House, patiently

#: Does it; the ids of the jobs that it touches.
Fault = Callable[[House, random.Random], set[str]]
FREEZE_SECONDS = 4.0  #: twice the lease
LONGEST_SECONDS = 60.0  #: a touched job that has not gone on by then is a violation


@dataclass(slots=True)
class Tally:
    """What one kind of fault has come to."""

    jobs: int = 0
    seconds: list[float] = field(default_factory=list)  #: of each, until all it touched went on


def kill_engine(house: House, chance: random.Random) -> set[str]:
    return _signal_holder(house, chance, signal.SIGKILL)


def freeze_engine(house: House, chance: random.Random) -> set[str]:
    """Stopped for longer than its lease, then awake again."""
    engines = _holders(house)
    pid = chance.choice(sorted(engines))
    touched = engines[pid]
    _send(pid, signal.SIGSTOP)
    threading.Timer(FREEZE_SECONDS, _send, (pid, signal.SIGCONT)).start()
    return touched


def kill_parent(house: House, chance: random.Random) -> set[str]:
    touched = house.running()
    _send(chance.choice(house.pids("parent")), signal.SIGKILL)
    return touched


def roll(house: House, chance: random.Random) -> set[str]:
    """A worker is replaced: SIGTERM to its parent."""
    touched = house.running()
    _send(chance.choice(house.pids("parent")), signal.SIGTERM)
    return touched


def kill_valkey(house: House, chance: random.Random) -> set[str]:
    touched = house.running()
    for pid in house.pids("valkey"):
        _send(pid, signal.SIGKILL)
    return touched


def kill_api(house: House, chance: random.Random) -> set[str]:
    for pid in house.pids("api"):
        _send(pid, signal.SIGKILL)
    return set()


def flush_scripts(house: House, chance: random.Random) -> set[str]:
    touched = house.running()
    house.redis.script_flush()
    return touched


def cut_connections(house: House, chance: random.Random) -> set[str]:
    touched = house.running()
    for kind in ("normal", "pubsub"):
        house.redis.client_kill_filter(_type=kind, skipme=True)
    return touched


FAULTS: Mapping[str, Fault] = {
    "worker SIGKILL": kill_engine,
    "worker SIGSTOP, twice the lease": freeze_engine,
    "worker's parent SIGKILL": kill_parent,
    "worker SIGTERM": roll,
    "Valkey SIGKILL": kill_valkey,
    "API SIGKILL": kill_api,
    "SCRIPT FLUSH": flush_scripts,
    "CLIENT KILL": cut_connections,
}


class Saboteur:
    """Does one fault after another, and waits after each until what it touched goes on."""

    def __init__(self, house: House, seed: int, harmless: Callable[[str], bool]) -> None:
        """Take ``harmless``: whether a job of that id is one that may go on when it likes (poison waits its turn)."""
        self.tallies: dict[str, Tally] = {}
        self.violations: list[str] = []
        self._house = house
        self._chance = random.Random(seed)
        self._harmless = harmless
        self._bag: list[str] = []

    def strike(self) -> None:
        """One random fault; each kind comes once before any comes again."""
        if not self._bag:
            self._bag = sorted(FAULTS)
            self._chance.shuffle(self._bag)
        self.do(self._bag.pop())

    def do(self, name: str) -> None:
        """This fault, and its recovery."""
        try:
            touched = {job_id for job_id in FAULTS[name](self._house, self._chance) if self._harmless(job_id)}
        except (redis.RedisError, OSError, IndexError):
            return  # nobody there to hit: the fault before is not over
        start = time.monotonic()
        before = patiently(lambda: self._house.events(touched), LONGEST_SECONDS) or {}
        ended = self._await(lambda: self._recovered(before))
        tally = self.tallies.setdefault(name, Tally())
        tally.jobs += len(touched)
        tally.seconds.append(time.monotonic() - start)
        if not ended:
            self.violations.append(f"{name}: not over after {LONGEST_SECONDS:.0f} s")

    def _recovered(self, before: Mapping[str, int]) -> bool:
        """Redis and the API answer, and every touched job has said something new or has ended."""
        self._house.redis.ping()
        now = self._house.events(set(before))
        moved = all(now.get(job_id, count + 1) > count for job_id, count in before.items())
        return moved and httpx2.get(f"{self._house.url}/ready", timeout=2).status_code == 200

    def _await(self, met: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + LONGEST_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.RedisError, OSError, httpx2.HTTPError):
                if met():
                    return True
            time.sleep(0.02)
        return False


def kill_one_of(house: House, pids: Iterable[int], chance: random.Random) -> bool:
    """SIGKILL one of these; False where there is none."""
    found = sorted(pids)
    if found:
        _send(chance.choice(found), signal.SIGKILL)
    return bool(found)


def holders(house: House) -> dict[int, set[str]]:
    """Engine processes that hold jobs, and which; none while Redis is away."""
    return patiently(lambda: _holders(house), 5) or {}


def _holders(house: House) -> dict[int, set[str]]:
    held = {pid: house.held(name) for pid, name in house.engines().items()}
    return {pid: jobs for pid, jobs in held.items() if jobs}


def _signal_holder(house: House, chance: random.Random, number: signal.Signals) -> set[str]:
    engines = _holders(house)
    pid = chance.choice(sorted(engines))
    _send(pid, number)
    return engines[pid]


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
