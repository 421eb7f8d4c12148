"""A small world for the API's tests: a real Valkey, the app behind a real socket, an instant worker as a process.

A test module names it in ``pytest_plugins`` for its fixtures and imports its functions (so: PYTEST_DONT_REWRITE).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.app import create_app
from api.server import Server, server
from api.settings import ApiSettings
from jobs.async_store import AsyncStore
from jobs.settings import StoreSettings
from tests.conftest import start_valkey

ROOT = Path(__file__).resolve().parent.parent
GENERATE: dict[str, Any] = {"kind": "generate", "input": {"prompt": "Once upon"}, "params": {"max_tokens": 8}}


class Front:
    """The app on a free loopback port, served by a thread."""

    def __init__(self, settings: ApiSettings, redis_url: str) -> None:
        self.settings = settings
        self._store_settings = StoreSettings(redis_url=redis_url, durability=settings.durability)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: Server
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10)

    def stop(self) -> None:
        self.server.handle_exit(15, None)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        store = AsyncStore.connect(self._store_settings)
        self.server = server(create_app(self.settings, store), self.settings)
        self._started.set()
        try:
            await self.server.serve(sockets=[self._socket])
        finally:
            await store.close()


@contextlib.contextmanager
def front(redis_url: str, **settings: Any) -> Iterator[httpx2.Client]:
    """A client of an API of its own; every other setting is the default."""
    running = Front(ApiSettings(**settings), redis_url)
    running.start()
    with httpx2.Client(base_url=running.url, timeout=30) as client:
        try:
            yield client
        finally:
            running.stop()


@contextlib.contextmanager
def worker(redis_url: str, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process with the instant engine."""
    named = {"redis_url": redis_url, "engine": "instant", "model": "instant", "instant_step_ms": 5, **settings}
    environment = {**os.environ, **{f"HEADRACE_{name.upper()}": str(value) for name, value in named.items()}}
    process = subprocess.Popen([sys.executable, "-m", "worker"], cwd=ROOT, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def api_redis() -> Iterator[str]:
    """A Valkey that no other test empties."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        running = start_valkey(Path(name))
        yield running.url
        running.process.terminate()
        running.process.wait(10)


@pytest.fixture(scope="session")
def api(api_redis: str) -> Iterator[httpx2.Client]:
    """A client of an API with one worker; shared, so every test makes jobs of its own."""
    with worker(api_redis), front(api_redis) as client:
        until_ready(client)
        yield client


@pytest.fixture(scope="session")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of an API without a worker: what is queued stays queued."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        running = start_valkey(Path(name))
        with front(running.url) as client:
            yield client
        running.process.terminate()
        running.process.wait(10)


def until_ready(client: httpx2.Client) -> None:
    """Wait until a worker is alive."""
    deadline = time.monotonic() + 30
    while client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline, client.get("/ready").text
        time.sleep(0.05)


def fresh_id() -> str:
    return f"t-{uuid.uuid4().hex}"


def submit(client: httpx2.Client, **changes: Any) -> dict[str, Any]:
    """A new job, accepted."""
    answer = client.post("/v1/jobs", json={**GENERATE, **changes})
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


def finish(client: httpx2.Client, **changes: Any) -> dict[str, Any]:
    """A new job, ended."""
    job = submit(client, **changes)
    found: dict[str, Any] = client.get(f"{job['urls']['self']}?wait=20").json()
    assert found["finished_at"] is not None, found
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class SentEvent:
    """One server-sent event as a client reads it."""

    number: int
    type: str
    fields: dict[str, Any]


def read_events(lines: Iterator[str]) -> Iterator[SentEvent]:
    """Take an event stream apart, comments left out."""
    parts: dict[str, str] = {}
    for line in lines:
        if not line and parts:
            yield SentEvent(int(parts["id"]), parts["event"], json.loads(parts["data"]))
            parts = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            parts[name] = value


def events_of(client: httpx2.Client, job_id: str, **options: Any) -> list[SentEvent]:
    """All events from where the options say to the end."""
    with client.stream("GET", f"/v1/jobs/{job_id}/events", **options) as answer:
        assert answer.status_code == 200, answer.read()
        return list(read_events(answer.iter_lines()))
