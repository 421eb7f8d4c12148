"""``python -m api`` as a process: how it starts and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import redis

from api import server as api_server
from tests.api_world import front, submit
from tests.conftest import Server

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def start(**settings: object) -> subprocess.Popen[str]:
    environment = {**os.environ, **{f"HEADRACE_{name.upper()}": str(value) for name, value in settings.items()}}
    command = [sys.executable, "-m", "api"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def process(valkey_url: str) -> Iterator[tuple[subprocess.Popen[str], httpx2.Client]]:
    """A server process and a client of it."""
    port = free_port()
    running = start(redis_url=valkey_url, port=port)
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        deadline = time.monotonic() + 30
        while True:
            try:
                client.get("/health")
                break
            except httpx2.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield running, client
    running.kill()
    running.communicate()


def test_a_server_that_is_told_to_end_does_so_at_once(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_server, "TICK_SECONDS", 3_600.0)
    with front(valkey_url) as client:
        assert client.get("/health").headers["date"]
        start = time.monotonic()

    assert time.monotonic() - start < 2


def test_sigterm_answers_what_is_held_open_and_exits_0(process: tuple[subprocess.Popen[str], httpx2.Client]) -> None:
    running, client = process
    job, held = submit(client), list[httpx2.Response]()
    waiting = threading.Thread(target=lambda: held.append(client.get(f"{job['urls']['self']}?wait=50")))
    waiting.start()
    with client.stream("GET", job["urls"]["events"]) as stream:
        lines = stream.iter_lines()
        next(lines)
        time.sleep(0.3)  # nothing tells when the server has begun to hold the poll
        start_time = time.monotonic()
        running.send_signal(signal.SIGTERM)
        rest = list(lines)
    waiting.join(10)
    _, log = running.communicate(timeout=10)

    assert time.monotonic() - start_time < 5
    assert running.returncode == 0
    assert [answer.json()["status"] for answer in held] == ["queued"]
    assert not any(line.startswith("event: finished") for line in rest)
    assert "Traceback" not in log
    assert job["id"] in log


def test_an_evicting_redis_is_refused_at_start_by_name(own_valkey: Server) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
    running = start(redis_url=own_valkey.url, port=free_port())
    try:
        _, log = running.communicate(timeout=30)
    finally:
        running.kill()

    assert running.returncode == 2
    assert "maxmemory-policy" in log
    assert "Traceback" not in log


def test_it_starts_before_its_redis_does() -> None:
    port = free_port()
    running = start(redis_url=f"redis://127.0.0.1:{free_port()}/0", port=port)
    deadline = time.monotonic() + 30
    status = 0
    while not status and time.monotonic() < deadline:
        try:
            status = httpx2.get(f"http://127.0.0.1:{port}/ready").status_code
        except httpx2.TransportError:
            time.sleep(0.05)
    running.terminate()
    running.communicate(timeout=20)

    assert status == 503
    assert running.returncode == 0
