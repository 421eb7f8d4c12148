"""Drives a load through a bare engine: starts ``python -m core.bench`` and reads what it says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from headrace import rooms
from headrace.bench.load import Load
from headrace.bench.samples import Sample
from headrace.settings import SettingError, Settings

#: Settings that the program takes as flags.
ENGINE_FLAGS = (
    *("engine", "model", "revision", "dtype", "kv_dtype", "device", "kv_memory"),
    *("max_model_len", "max_running", "step_tokens", "threads", "instant_step_ms"),
)


class BareEngine:
    """The program, with its engine loaded."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.card: Mapping[str, Any] = self._read()["card"]

    def drive(self, load: Load, progress: Callable[[], None]) -> list[Sample]:
        """Hand it the load; samples as they ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(load.to_wire()) + "\n")
        self._process.stdin.flush()
        samples = []
        while "deliveries" in (wire := self._read()):
            samples.append(Sample.from_wire(wire))
            progress()
        return samples

    def _read(self) -> dict[str, Any]:
        """The next line.

        Raises:
            SettingError: the program has ended; its own words are on standard error.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SettingError(f"the engine's process ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def bare_engine(settings: Settings, environ: Mapping[str, str]) -> Iterator[BareEngine]:
    """Start it for the time of a ``with``.

    Raises:
        SettingError: it cannot be loaded with these settings.
    """
    if settings.engine == "vllm":
        raise SettingError("--in-process runs the engines torch and instant; measure vllm through its server")
    flags = [word for name in ENGINE_FLAGS for word in _flag(name, getattr(settings, name))]
    process = subprocess.Popen(
        rooms.tethered(rooms.command("core.bench", *flags)),
        env=rooms.environment(settings, environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield BareEngine(process)
    finally:
        process.kill()
        process.communicate()


def _flag(name: str, value: object) -> list[str]:
    return ["--" + name.replace("_", "-"), str(value)] if value != "" else []
