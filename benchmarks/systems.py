"""The systems side by side: our bare engine, the whole of Headrace over HTTP, and two ways of plain Transformers.

Each takes the workload and answers with the seconds it took and the answer tokens it made.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import AutoModelForCausalLM

from benchmarks.padded import generate_padded
from benchmarks.workload import RUNNING, Item
from core.engine import Engine, EngineConfig
from core.request import FinishedEvent, Request, SamplingParams

BEAT_SECONDS = 2.5  #: after so long a worker has told its counters again


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One system over the workload, once."""

    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class BareEngine:
    """``core.engine.Engine`` in this process: no queue, no HTTP."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        config = EngineConfig(model=str(folder), dtype=dtype, threads=threads, max_running=RUNNING)
        self._engine = Engine.load(config)
        self._rounds = itertools.count()

    def run(self, items: Sequence[Item]) -> Run:
        engine, waiting, done = self._engine, list(enumerate(items)), 0
        salt = f"round-{next(self._rounds)}"  # no prompt is known from the round before
        start = time.perf_counter()
        while done < len(items):
            while waiting and engine.room:
                number, item = waiting.pop(0)
                params = SamplingParams(max_tokens=item.answer_tokens, ignore_eos=True)
                engine.add(f"bench-{number}", Request(token_ids=item.token_ids, params=params, cache_salt=salt))
            done += sum(isinstance(event, FinishedEvent) for event in engine.step())
        return Run(seconds=time.perf_counter() - start, tokens=sum(item.answer_tokens for item in items))


class PlainTransformers:
    """``model.generate`` as its users call it, left-padded in batches of ``rows``; only useful tokens count."""

    def __init__(self, folder: Path, dtype: str, *, rows: int, limit: int | None = None) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._rows = rows
        self._limit = limit

    def run(self, items: Sequence[Item]) -> Run:
        items = items[: self._limit]
        start = time.perf_counter()
        for first in range(0, len(items), self._rows):
            generate_padded(self._model, items[first : first + self._rows])
        return Run(seconds=time.perf_counter() - start, tokens=sum(item.answer_tokens for item in items))


def others_cpu_seconds(root: int) -> tuple[float, float]:
    """Of processors, in the server's processes but its workers': those of API and Valkey, and of the courier and of who
    started them."""
    ticks, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            parents[int(folder.name)], ticks[int(folder.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours = {root}
    while more := {pid for pid, parent in parents.items() if parent in ours and pid not in ours and not _works(pid)}:
        ours |= more
    a_second = os.sysconf("SC_CLK_TCK")
    served, every = (sum(ticks.get(pid, 0) for pid in pids) for pids in ({*filter(_serves, ours)}, ours))
    return served / a_second, (every - served) / a_second


def _serves(pid: int) -> bool:
    """It is the API or Valkey."""
    command = _command(pid)
    return b"-m\0api" in command or b"valkey-server" in command.partition(b"\0")[0]


def _works(pid: int) -> bool:
    """It is a worker's parent, or gone."""
    return b"-m\0worker" in (_command(pid) or b"-m\0worker")


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class WholeSystem:
    """``headrace up`` with one worker; 64 clients submit over HTTP and wait."""

    def __init__(self, folder: Path, dtype: str, data_dir: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "headrace", "up", "--port", str(port), "--model", str(folder)]
        command += ["--dtype", dtype, "--data-dir", str(data_dir), "--max-running", str(RUNNING)]
        self._log = (data_dir / "bench-up.log").open("wb")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env={**os.environ})
        self.url = f"http://127.0.0.1:{port}"
        self._rounds = itertools.count()
        self._spent = {"served_seconds": 0.0, "started_seconds": 0.0}
        self._await(lambda: httpx2.get(f"{self.url}/ready", timeout=2).status_code == 200, seconds=180)

    def run(self, items: Sequence[Item]) -> Run:
        with httpx2.Client(base_url=self.url, timeout=300, limits=httpx2.Limits(max_connections=len(items))) as client:
            before, start = others_cpu_seconds(self._process.pid), time.perf_counter()
            salt = f"round-{next(self._rounds)}"
            with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
                tokens = list(pool.map(lambda item: self._one(client, item, salt), items))
            seconds = time.perf_counter() - start
            after = others_cpu_seconds(self._process.pid)
            for name, early, late in zip(self._spent, before, after, strict=True):
                self._spent[name] += late - early
            return Run(seconds=seconds, tokens=sum(tokens))

    def counters(self) -> dict[str, float]:
        """Seconds so far: in ``step()``, in the rest of the worker's loop; during ``run`` those of processors in API
        and Valkey, and in what starts them.

        After a rest, in which the worker tells its counters.
        """
        time.sleep(BEAT_SECONDS)
        worker = httpx2.get(f"{self.url}/v1/workers", timeout=10).json()["data"][0]
        stats = {name: float(worker["stats"][name]) for name in ("step_seconds", "loop_seconds")}
        return {**stats, **self._spent}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()

    def _one(self, client: httpx2.Client, item: Item, salt: str) -> int:
        body = {
            "kind": "generate",
            "input": {"prompt_token_ids": list(item.token_ids)},
            "cache_salt": salt,
            "params": {"max_tokens": item.answer_tokens, "ignore_eos": True},
        }
        answer = client.post("/v1/jobs", json=body, headers={"Prefer": "wait=60"})
        answer.raise_for_status()
        job = answer.json()
        while job["status"] in ("queued", "running"):
            job = client.get(f"/v1/jobs/{job['id']}", params={"wait": 60}).json()
        if job["status"] != "succeeded":
            raise RuntimeError(f"{job['id']} is {job['status']}: {job['error']}")
        tokens: int = job["result"]["usage"]["completion_tokens"]
        if tokens != item.answer_tokens:
            raise RuntimeError(f"{job['id']} has {tokens} tokens and was asked for {item.answer_tokens}")
        return tokens

    def _await(self, ready: Callable[[], bool], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"headrace up ended with {self._process.returncode}; see {self._log.name}")
            try:
                if ready():
                    return
            except httpx2.HTTPError:
                pass
            time.sleep(0.2)
        raise TimeoutError(f"headrace up was not ready within {seconds:g} s; see {self._log.name}")
