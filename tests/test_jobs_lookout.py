"""The lookout: a busy worker hears of jobs without waiting for Redis."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import redis

from jobs.connection import connect
from jobs.lookout import Lookout, _poll
from jobs.store import Store
from tests.conftest import Server, start_valkey
from tests.jobs_world import CARD, OTHER, add, born, settings, take


@pytest.fixture
def store(own_valkey: Server) -> Iterator[Store]:
    store = Store(settings(own_valkey.url))
    born(store)
    yield store
    store.close()


@pytest.fixture(params=["at a glance", "by the client's own question"])
def lookout(own_valkey: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lookout]:
    """Where the client shows its sockets, and where it does not."""
    if request.param != "at a glance":
        monkeypatch.setattr("jobs.lookout._poll", lambda *connections: None)
    lookout = Lookout(own_valkey.url, CARD)
    lookout.prepare()
    assert (lookout._poll is not None) == (request.param == "at a glance")
    yield lookout
    lookout.close()


def test_what_keeps_what_it_has_read_to_itself_is_not_looked_at_from_outside(own_valkey: Server) -> None:
    class Sealed(socket.socket):
        """As ssl.SSLSocket."""

    bare = connect(own_valkey.url).connection_pool.make_connection()
    bare.connect()
    with Sealed() as sealed:
        assert _poll(bare) is not None
        assert _poll(bare, SimpleNamespace(_sock=sealed)) is _poll(bare, SimpleNamespace()) is None
    bare.disconnect()


def hears(lookout: Lookout) -> bool:
    """The answer to a question that is put now."""
    lookout.jobs_wait(ask=True)
    assert lookout._connection.can_read(5)
    return lookout.jobs_wait(ask=False)


def test_it_says_whether_jobs_wait_that_this_engine_may_take(store: Store, lookout: Lookout) -> None:
    assert not hears(lookout)
    add(store, "other", model=OTHER.name)
    take(store, card=OTHER)
    assert not hears(lookout)
    add(store, "a")
    assert hears(lookout)
    take(store)
    assert not hears(lookout)


@pytest.mark.parametrize("meanwhile", ["nothing", "a talk"])
def test_it_hears_of_an_arrival_unasked(store: Store, lookout: Lookout, meanwhile: str) -> None:
    assert not any(lookout.jobs_wait(ask=False) for _ in range(3))
    add(store, "a")
    if meanwhile == "a talk":
        assert lookout._ear.can_read(5)
        lookout.prepare()
    deadline = time.monotonic() + 5
    while not lookout.jobs_wait(ask=False):
        assert time.monotonic() < deadline
    store.connection.config_resetstat()
    assert not any(lookout.jobs_wait(ask=False) for _ in range(3))
    assert "cmdstat_exists" not in store.connection.info("commandstats")


def test_a_server_that_hangs_is_neither_waited_for_nor_asked_again(
    own_valkey: Server, store: Store, lookout: Lookout
) -> None:
    store.connection.config_resetstat()
    assert not lookout.jobs_wait(ask=False)
    own_valkey.process.send_signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        assert [lookout.jobs_wait(ask=True) for _ in range(1_000)] == [False] * 1_000
        assert time.monotonic() - start < 1
    finally:
        own_valkey.process.send_signal(signal.SIGCONT)
    assert lookout._connection.can_read(5)
    assert not lookout.jobs_wait(ask=False)
    assert store.connection.info("commandstats")["cmdstat_exists"]["calls"] == 1


def test_a_server_that_dies_with_a_question_is_not_connected_to_between_steps(
    own_valkey: Server, lookout: Lookout, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_valkey.process.send_signal(signal.SIGSTOP)
    assert not lookout.jobs_wait(ask=True)
    own_valkey.process.kill()
    own_valkey.process.wait(10)
    monkeypatch.setattr(lookout._connection, "connect", lambda: pytest.fail("it waits for Redis"))
    assert [lookout.jobs_wait(ask=True) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("fault", [redis.ConnectionError("cut"), OSError("cut")])
def test_a_fault_while_it_looks_for_the_answer_means_that_jobs_may_wait(
    lookout: Lookout, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(seconds: float) -> bool:
        raise fault

    lookout.jobs_wait(ask=True)
    monkeypatch.setattr(lookout._connection, "can_read", fail)
    assert [lookout.jobs_wait(ask=True) for _ in range(2)] == [True] * 2


def test_with_a_server_that_died_jobs_may_wait_until_it_is_prepared_anew(own_valkey: Server, lookout: Lookout) -> None:
    assert not hears(lookout)
    own_valkey.process.kill()
    own_valkey.process.wait(10)
    assert [lookout.jobs_wait(ask=True) for _ in range(3)][1:] == [True, True]
    again = start_valkey(own_valkey.folder)
    try:
        assert lookout.jobs_wait(ask=True)
        lookout.prepare()
        assert not hears(lookout)
    finally:
        again.process.kill()
        again.process.wait(10)
