"""A peer's process, seen from the run: started in its own session, told words, and its processor time counted."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rig import ROOT

TICKS = os.sysconf("SC_CLK_TCK")


class Ended(Exception):
    """The peer's process has ended by itself."""


class Seat:
    """One peer, loaded. What it says while it works goes to its log."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self.facts: Mapping[str, Any] = {}

    def await_ready(self) -> None:
        """Return once it has loaded.

        Raises:
            Ended: it never will.
        """
        self.facts = self._read()

    def ask(self, words: str) -> dict[str, Any]:
        """Say something and return the answer.

        Raises:
            Ended: there will be none.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{words}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Ended(self._log.name) from None
        return self._read()

    def cpu_seconds(self) -> float:
        """What all processes of its session have used so far."""
        return session_cpu_seconds(self._process.pid)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Ended(self._log.name)
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """Processor seconds up to a moment: the machine's, and each seat's."""

    machine: float
    seats: Mapping[str, float]


def read_cpu(seats: Mapping[str, Seat]) -> Cpu:
    """Now; a machine without ``/proc`` counts as idle."""
    return Cpu(machine=machine_cpu_seconds(), seats={name: seat.cpu_seconds() for name, seat in seats.items()})


def machine_cpu_seconds() -> float:
    """Of all processors, idle and waiting times left out."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, irq, softirq, steal = (int(word) for word in words)
    return (user + nice + system + irq + softirq + steal) / TICKS


def session_cpu_seconds(session: int) -> float:
    """Of all living processes in it."""
    ticks = 0
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS
