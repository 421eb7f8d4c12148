"""For tests that start programs: a clean environment, a free port, waiting for what happens. Holds no test."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without anything of ours."""
    ours = ("HEADRACE_", "PYTHON", "REDIS_URL")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(ours)}, **more}


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(met: Callable[[], Any], *processes: subprocess.Popen[Any], seconds: float = 30) -> Any:
    """Ask again and again until the answer is true, and return it; a process that ends meanwhile is a failure."""
    deadline = time.monotonic() + seconds
    while not (answer := met()):
        ended = [process.args for process in processes if process.poll() is not None]
        assert not ended, f"ended: {ended}"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return answer


def get(url: str, key: str = "") -> Any:
    """The JSON at an address; None while nobody answers there, or not with success."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx2.get(url, headers=headers, trust_env=False, timeout=5)
    except httpx2.TransportError:
        return None
    return reply.json() if reply.is_success else None


def workers(url: str, key: str = "") -> Sequence[Any]:
    """The live workers that an API shows; none while it does not answer."""
    answer = get(f"{url}/v1/workers", key)
    return answer["data"] if answer else ()


def has_ended(pid: int) -> bool:
    """The process is gone, or dead and waiting for somebody to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
