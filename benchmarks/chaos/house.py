"""``headrace up`` as a process, and who lives in it: what the faults need to aim at."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from jobs import keys
from jobs.connection import connect

ROOT = Path(__file__).parent.parent.parent
TIMES = ("--lease-seconds", "2", "--grace-seconds", "1", "--tick-seconds", "0.5", "--drain-seconds", "2")
ROOMS = {"valkey": "valkey-server", "api": "-m api", "engine": "--engine-process", "parent": "-m worker"}


@dataclass(slots=True)
class House:
    """A running ``headrace up``."""

    process: subprocess.Popen[str]
    url: str
    redis: Any  #: a client that sends nothing twice
    log: Path  #: what it writes on standard error

    def pids(self, room: str) -> list[int]:
        """Processes of a room that run now."""
        found = [(pid, command_line(pid)) for pid in descendants(self.process.pid)]
        rooms = {pid: next((name for name, mark in ROOMS.items() if mark in line), "") for pid, line in found}
        return sorted(pid for pid, name in rooms.items() if name == room)

    def engines(self) -> dict[int, str]:
        """Engine processes with a lease, by pid: the worker's name."""
        names = [name.decode() for name in self.redis.zrange(keys.LEASES, 0, -1)]
        cards = [(name, self.redis.hget(f"{keys.CARD}{name}", "card")) for name in names]
        alive = set(self.pids("engine"))
        return {pid: name for name, card in cards if card and (pid := int(json.loads(card)["pid"])) in alive}

    def held(self, name: str) -> set[str]:
        """Ids of the jobs a worker holds."""
        return {member.decode().rpartition(":")[0] for member in self.redis.smembers(f"{keys.HELD}{name}")}

    def running(self) -> set[str]:
        """Ids of all jobs that run."""
        return {member.decode().rpartition(":")[0] for member in self.redis.zrange(keys.WIP, 0, -1)}

    def events(self, job_ids: set[str]) -> dict[str, int]:
        """How long each job's log is; those that have ended are left out."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hmget(f"{keys.JOB}{job_id}", "status", "events")
            rows = pipeline.execute()
        unfinished = (b"queued", b"started")
        return {job_id: int(row[1] or 0) for job_id, row in zip(job_ids, rows, strict=True) if row[0] in unfinished}

    def rss_mb(self) -> dict[str, float]:
        """Mean resident memory of a room's processes, in MB."""
        sizes = {room: [rss(pid) for pid in self.pids(room)] for room in ROOMS}
        sizes["up"] = [rss(self.process.pid)]
        return {room: sum(each) / len(each) / 1e6 for room, each in sizes.items() if each}


@contextmanager
def living(folder: Path, *flags: str) -> Iterator[House]:
    """A house on a free port, ready; killed with all that is below it if it does not stop."""
    argv = [sys.executable, "-m", "headrace", "up", "--json", "--port", "0", "--data-dir", str(folder / "queue")]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "REDIS_URL"))}
    with (folder / "up.log").open("w") as err:
        process = subprocess.Popen(
            [*argv, *TIMES, *flags],
            cwd=folder,
            env={**kept, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"headrace up does not start: {(folder / 'up.log').read_text()[-2000:]}")
            ready = json.loads(line)
            client: redis.Redis = connect(ready["redis_url"])
            yield House(process=process, url=ready["url"], redis=client, log=folder / "up.log")
            client.close()
        finally:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Ctrl-C; whatever is left after half a minute is killed."""
    below = descendants(process.pid)
    process.send_signal(2)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        for pid in (process.pid, *below):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def descendants(pid: int) -> list[int]:
    """Every process below one."""
    below: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
            below.setdefault(parent, []).append(int(folder.name))
    found, wave = list[int](), below.get(pid, [])
    while wave:
        found += wave
        wave = [child for one in wave for child in below.get(one, [])]
    return found


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def rss(pid: int) -> int:
    """Bytes; 0 for a process that is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def patiently(read: Any, seconds: float = 30) -> Any:
    """What ``read`` gives, once Redis is there to be asked; None after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return read()
        except (redis.RedisError, OSError):
            time.sleep(0.02)
    return None
