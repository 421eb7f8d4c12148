"""The pulse: what counts as away, and what does not."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis
import uvloop

from core.errors import NotDurable, StoreUnavailable
from core.request import Request
from jobs.async_store import AsyncStore
from jobs.connection import connect_async
from jobs.durable import check_on_disk
from jobs.job import NewJob
from jobs.lane import Lane
from jobs.pulse import PAUSE_SECONDS, Pulse
from tests.conftest import Server
from tests.jobs_world import settings

NEW = Request(prompt="Once upon")


def using(url: str, body: Callable[[AsyncStore], Awaitable[Any]]) -> Any:
    """Run ``body`` with an AsyncStore, in a loop of its own."""

    async def run() -> Any:
        store = AsyncStore(settings(url))
        try:
            async with asyncio.timeout(20):
                return await body(store)
        finally:
            await store.close()

    return asyncio.run(run())


class Fake:
    """A server that takes its time with a ping, and answers it as it was told; one connection after the other."""

    def __init__(self, answer: bytes, seconds: float = 0) -> None:
        self._answer, self._seconds = answer, seconds
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._listening:
            while True:
                talking, _ = self._listening.accept()
                with contextlib.suppress(ConnectionError), talking:
                    self._talk(talking)

    def _talk(self, talking: socket.socket) -> None:
        while sent := talking.recv(65_536):
            if b"PING" in sent:
                time.sleep(self._seconds)
            talking.sendall((self._answer if b"PING" in sent else b"+OK\r\n") * sent.count(b"*"))

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)


def problem(answer: bytes, seconds: float, act: Callable[[], None]) -> str:
    """What is wrong with such a server, once its answer must have come; ``act`` runs while a ping is under way."""
    fake = Fake(answer, seconds)

    async def run() -> str:
        pulse = Pulse(connect_async(fake.url))
        try:
            async with pulse.beating():
                await asyncio.sleep(PAUSE_SECONDS + 0.1)
                act()
                await asyncio.sleep(0.1)
        except StoreUnavailable as error:
            return str(error)
        finally:
            await pulse.close()
        return ""

    try:
        return uvloop.run(run())  # as the API does
    finally:
        fake.close()


def test_a_server_that_loads_is_away() -> None:
    assert "loading" in problem(b"-LOADING loading the dataset\r\n", 0, lambda: None)


@pytest.mark.parametrize("answer", [b"-MISCONF no disk\r\n", b"-NOAUTH who are you\r\n", b"-BUSY a script runs\r\n"])
def test_a_server_that_refuses_is_not_away(answer: bytes) -> None:
    """Each call hears the refusal itself: on a full disk jobs can still be read."""
    assert problem(answer, 0, lambda: None) == ""


def test_a_slow_disk_is_not_taken_for_a_server_that_hangs(valkey_url: str) -> None:
    async def body(door: AsyncStore) -> None:
        wait = ("WAITAOF", 1, 1, 1500)
        door._submits = Lane(door._submitting, wait, functools.partial(check_on_disk, wait))
        start = asyncio.get_running_loop().time()
        with pytest.raises(NotDurable):  # a replica that does not exist stands for a disk that takes its time
            await door.submit(NewJob(id="a", request=NEW))
        assert asyncio.get_running_loop().time() - start > 1.4

    using(valkey_url, body)


def test_a_connection_that_is_cut_is_no_outage(valkey_url: str, valkey: redis.Redis) -> None:
    async def body(door: AsyncStore) -> None:
        await door.submit(NewJob(id="a", request=NEW))
        for _ in range(20):
            valkey.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(PAUSE_SECONDS / 5)
            await door.check()
        assert (await door.get("a")).id == "a"

    using(valkey_url, body)


def test_a_loop_that_was_busy_itself_does_not_blame_the_server() -> None:
    assert problem(b"+PONG\r\n", 0.3, lambda: time.sleep(0.8)) == ""
    assert "no answer" in problem(b"+PONG\r\n", 2, lambda: time.sleep(0.8))


def test_a_call_that_the_hanging_server_has_does_not_hold_up_those_after_it(own_valkey: Server) -> None:
    async def body(door: AsyncStore) -> None:
        await door.submit(NewJob(id="a", request=NEW))
        own_valkey.process.send_signal(signal.SIGSTOP)
        try:
            start = asyncio.get_running_loop().time()
            with pytest.raises(StoreUnavailable, match="no answer within"):
                await door.get("a")
            assert asyncio.get_running_loop().time() - start < 2  # promised: 1
            start = asyncio.get_running_loop().time()
            calls = [door.get("a"), door.submit(NewJob(id="b", request=NEW)), door.inspect(), door.queue()]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(answer) for answer in answers] == [StoreUnavailable] * 4
            assert asyncio.get_running_loop().time() - start < 0.2  # at once: nobody is asked
        finally:
            own_valkey.process.send_signal(signal.SIGCONT)
        start = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() - start < 4:  # promised: 2
            try:
                assert (await door.get("a")).id == "a"
                break
            except StoreUnavailable:
                await asyncio.sleep(0.02)
        assert (await door.submit(NewJob(id="b", request=NEW))).job.id == "b"

    using(own_valkey.url, body)
