"""A server for one command: its own Valkey in a temporary folder, a free port, a key nobody else knows."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from headrace import rooms
from headrace.errors import ClientError
from headrace.settings import SettingError, Settings

STOP_SECONDS = 60.0


class PrivateServerFailed(ClientError):
    """It ended before it was ready; its own words are on standard error."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the private server did not start (exit code {code})")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateServer:
    """Where it is and how to be let in."""

    url: str
    api_key: str


@contextlib.contextmanager
def private_server(settings: Settings, environ: Mapping[str, str]) -> Iterator[PrivateServer]:
    """Start ``headrace up`` for the time of a ``with``; its queue is gone afterwards.

    Raises:
        SettingError: these settings can never work.
        PrivateServerFailed: it ended before it was ready.
    """
    key = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="headrace-") as name:
        nothing = Path(name) / "nothing.toml"
        nothing.touch()
        own = replace(settings, api_key=key, api_key_file="", redis_url="", data_dir=f"{name}/queue")
        own = replace(own, host="127.0.0.1", port=0, drain_seconds=1, log_level="warning")
        inherited = {variable: value for variable, value in environ.items() if variable != "REDIS_URL"}
        process = subprocess.Popen(
            # a file without settings, so that ./headrace.toml does not fill what was emptied above
            rooms.tethered(rooms.command("headrace", "up", "--json", "--config", str(nothing)), "TERM"),
            env=rooms.environment(own, inherited),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield PrivateServer(url=_read_url(process), api_key=key)
        finally:
            _stop(process)


def _read_url(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout else ""
    if line:
        return str(json.loads(line)["url"])
    code = process.wait()
    if code == rooms.BAD_CONFIGURATION:
        raise SettingError("the private server cannot work with these settings; its lines above say why")
    raise PrivateServerFailed(code)


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
