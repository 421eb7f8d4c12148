"""The server's faults: lost scripts, full memory, no disk, no answer; and which servers we refuse."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from core.errors import NotDurable, StoreFull, StoreUnavailable, UnsafeServer
from jobs import keys
from jobs.connection import connect, judge
from jobs.durable import WAITS, check_on_disk
from jobs.job import JobState
from jobs.runner import Runner
from jobs.scripting import scripts
from jobs.settings import StoreSettings
from jobs.store import Outcome, Store
from jobs.wake import Sleeper
from tests.conftest import Server, start_valkey
from tests.jobs_world import add, audit, born, done, ended, kill, say, settings, take, text_of
from tests.proxy import proxied

S = JobState


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url))
    born(store)
    yield store
    store.close()


# -- scripts


def test_a_server_that_forgot_the_scripts_gets_them_again(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    valkey.script_flush()
    [job] = take(store)
    valkey.script_flush()
    reported = store.report([say(job, 1)], [done(job)])

    assert reported.refused == frozenset()
    assert text_of(store.events("a")) == "w1 "
    assert store.get("a").state is S.SUCCEEDED


def test_a_server_that_is_flushed_again_while_it_is_given_the_scripts_does_not_matter(
    store: Store, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Runner.load

    def load_and_lose(runner: Runner) -> None:
        load(runner)
        valkey.script_flush()

    monkeypatch.setattr(Runner, "load", load_and_lose)
    valkey.script_flush()
    add(store, "a")

    assert [job.id for job in take(store)] == ["a"]


def test_events_are_written_before_the_end_even_when_one_script_is_lost(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    [job] = take(store)
    valkey.script_flush()
    valkey.script_load(scripts()["settle"].text)
    store.report([say(job, 1)], [done(job)])

    assert text_of(store.events("a")) == "w1 "
    assert audit(valkey) == []


@pytest.mark.parametrize("kill_hard", [True, False])
def test_a_restarted_server_has_every_job_that_was_answered(own_valkey: Server, kill_hard: bool) -> None:
    store = Store(settings(own_valkey.url))
    born(store)
    for job_id in ("a", "b", "c"):
        add(store, job_id)
    [job] = take(store, room=1)
    store.report([say(job, 1)], [])
    own_valkey.process.kill() if kill_hard else own_valkey.process.terminate()
    own_valkey.process.wait(10)
    with pytest.raises(StoreUnavailable):
        store.get("a")
    again = start_valkey(own_valkey.folder)
    try:
        store.report([say(job, 2, first=2)], [done(job, "w1 w2 ")])

        assert text_of(store.events("a")) == "w1 w2 "
        assert [store.get(job_id).state for job_id in ("a", "b", "c")] == [S.SUCCEEDED, S.QUEUED, S.QUEUED]
        assert audit(store.connection) == []
    finally:
        again.process.kill()
        again.process.wait(10)
        store.close()


# -- memory


def test_with_memory_full_nothing_comes_in_and_everything_running_ends(own_valkey: Server) -> None:
    store = Store(settings(own_valkey.url))
    born(store)
    for job_id in "abcdef":
        add(store, job_id)
    taken = {job.id: job for job in take(store, room=5)}
    store.connection.config_set("maxmemory", 1)
    try:
        with pytest.raises((StoreUnavailable, StoreFull), match="memory"):  # by Redis, or by us where we looked again
            add(store, "late")
        assert store.renew("w", "busy", {job.id: job.attempt for job in taken.values()}, {}).lost == ()
        store.report([say(taken["a"], 1)], [done(taken["a"])])
        store.report([], [ended(taken["b"], Outcome.CANCELLED)])
        store.release([("c", 1)])
        store.cancel("d")
        kill(store)
        born(store)
        assert [job.id for job in take(store, room=1)] == ["e"]
        assert (store.expire(), store.promote()) == (0, 0)
        states = {job_id: store.get(job_id).state for job_id in "abcdef"}
    finally:
        store.connection.config_set("maxmemory", 0)

    assert [states[job_id] for job_id in "abcdef"] == [
        S.SUCCEEDED,
        S.CANCELLED,
        S.QUEUED,
        S.CANCELLED,  # it ran, and somebody wanted it to end: the death of its worker ended it
        S.RUNNING,
        S.QUEUED,
    ]
    assert audit(store.connection) == []
    store.close()


# -- disk


@pytest.fixture
def no_disk(valkey_url: str) -> Iterator[str]:
    """A server whose disk confirms nothing: WAITAOF answers [0, 0]."""
    with proxied(valkey_url) as proxy:
        proxy.after("WAITAOF", lambda moment: b"*2\r\n:0\r\n:0\r\n", times=1000)
        yield proxy.url


def test_what_the_disk_did_not_confirm_is_not_accepted_and_a_repeat_is_safe(
    no_disk: str, valkey_url: str, valkey: redis.Redis
) -> None:
    store = Store(settings(no_disk))
    with pytest.raises(NotDurable):
        add(store, "a")
    with pytest.raises(NotDurable):
        add(store, "a")  # known by now, and still not on disk
    store.close()

    sure = Store(settings(valkey_url))
    assert add(sure, "a").state is S.QUEUED
    assert valkey.llen(keys.READY) == 1
    sure.close()


def test_a_repeat_writes_so_that_its_own_wait_means_something(store: Store, valkey: redis.Redis) -> None:
    add(store, "a")
    assert valkey.get(keys.REPEATS) is None
    add(store, "a")

    assert valkey.get(keys.REPEATS) == b"1"


def test_durability_memory_does_not_wait(no_disk: str) -> None:
    store = Store(settings(no_disk, durability="memory"))

    assert add(store, "a").state is S.QUEUED
    store.close()


def test_a_timed_out_wait_raises() -> None:
    check_on_disk(WAITS["fsync"], [1, 0])
    with pytest.raises(NotDurable, match="within 2 s"):
        check_on_disk(WAITS["fsync"], [0, 0])
    check_on_disk(WAITS["replica"], [1, 1])
    with pytest.raises(NotDurable, match="within 2 s"):
        check_on_disk(WAITS["replica"], [1, 0])


# -- which servers will do


def test_a_safe_server_is_described(store: Store) -> None:
    report = store.inspect()

    assert (report.software, report.append_only, report.fsync) == ("valkey", True, "always")
    assert (report.eviction, report.durability) == ("none", "fsync")
    assert int(report.version.split(".")[0]) >= 8


GOOD: dict[str, Any] = {"redis_version": "7.2.4", "valkey_version": "9.1.2", "aof_enabled": 1, "maxmemory": 0}


@pytest.mark.parametrize(
    ("change", "fsync", "setting"),
    [
        ({"redis_version": "7.0.15"}, "always", "redis_version"),
        ({"aof_enabled": 0}, "always", "appendonly"),
        ({}, "no", "appendfsync"),
        ({"maxmemory": 5, "maxmemory_policy": "allkeys-lru"}, "always", "maxmemory-policy"),
    ],
)
def test_an_unsafe_server_is_refused_by_the_setting_that_makes_it_so(
    change: dict[str, Any], fsync: str, setting: str
) -> None:
    with pytest.raises(UnsafeServer, match=setting) as refused:
        judge({**GOOD, **change}, fsync, StoreSettings())

    assert refused.value.setting == setting
    judge({**GOOD, **change}, fsync, StoreSettings(durability="memory"))


@pytest.mark.parametrize(
    "change", [{"maxmemory_policy": "allkeys-lru"}, {"maxmemory": 5, "maxmemory_policy": "noeviction"}]
)
def test_a_policy_that_evicts_nothing_will_do(change: dict[str, Any]) -> None:
    assert judge({**GOOD, **change}, "everysec", StoreSettings()).fsync == "everysec"


def test_a_server_that_hides_its_configuration_is_judged_by_what_it_shows(
    store: Store, valkey_url: str, valkey: redis.Redis
) -> None:
    valkey.execute_command("ACL", "SETUSER", "shy", "on", ">p/w", "~*", "&*", "+@all", "-config")
    path = valkey_url.removeprefix("unix://")
    shy = Store(settings(f"unix://shy:p%2Fw@{path}"))

    assert shy.inspect().fsync == "unknown"
    add(shy, "a")
    valkey.execute_command("ACL", "DELUSER", "shy")
    shy.close()


def test_a_server_that_is_loading_is_not_there_yet_and_not_unsafe(own_valkey: Server) -> None:
    """While it reads its append-only file it says that it has none: a worker that asked then would give up for ever."""
    with redis.Redis.from_url(own_valkey.url) as client, client.pipeline(transaction=False) as pipeline:
        for number in range(5_000):
            pipeline.set(f"filler:{number}", "x")
        pipeline.execute()
    own_valkey.process.kill()
    own_valkey.process.wait()
    slowly = ("--key-load-delay", "200", "--loading-process-events-interval-bytes", "1024")
    again = start_valkey(own_valkey.folder, more=slowly, wait=False)
    store, seen, report = Store(settings(own_valkey.url)), set(), None
    try:
        while report is None:
            try:
                report = store.inspect()
            except StoreUnavailable as error:
                seen.add(str(error).removeprefix("the job store is unavailable: "))
    finally:
        store.close()
        again.process.kill()
        again.process.wait()

    assert "it is loading its data" in seen
    assert report.append_only


def test_a_server_without_an_append_only_file_is_refused(tmp_path: Path, own_valkey: Server) -> None:
    store = Store(settings(own_valkey.url))
    store.connection.config_set("appendonly", "no")
    with pytest.raises(UnsafeServer, match="appendonly"):
        store.inspect()
    with pytest.raises(UnsafeServer, match="appendonly"):
        add(store, "a")
    assert Store(settings(own_valkey.url, durability="memory")).inspect().append_only is False
    store.close()


# -- no server


def test_no_answer_is_one_error_of_ours() -> None:
    store = Store(settings("redis://127.0.0.1:1"))
    for call in (lambda: store.get("a"), store.inspect, lambda: store.wait(0.01), store.promote, lambda: add(store)):
        with pytest.raises(StoreUnavailable):
            call()


def test_a_wrong_password_is_named(own_valkey: Server) -> None:
    store = Store(settings(own_valkey.url))
    store.connection.config_set("requirepass", "secret")
    path = own_valkey.url.removeprefix("unix://")
    for url in (own_valkey.url, f"unix://:wrong@{path}"):
        with pytest.raises(StoreUnavailable):
            Store(settings(url)).get("a")
    right = Store(settings(f"unix://:secret@{path}"))

    assert add(right, "a").id == "a"


def test_a_bug_of_ours_is_not_taken_for_an_outage(store: Store, valkey: redis.Redis) -> None:
    valkey.set("headrace:leases", "not a set")

    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        born(store)


def test_nothing_is_sent_twice_behind_our_back(valkey_url: str) -> None:
    """redis-py tries ten times by default: a claim would run twice, and its first jobs would be nobody's."""
    retry = connect(valkey_url).get_retry()

    assert retry is not None
    assert retry.get_retries() == 0


def test_a_read_only_server_is_an_outage(store: Store, own_valkey: Server) -> None:
    replica = Store(settings(own_valkey.url, durability="memory"))
    replica.connection.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StoreUnavailable):
        add(replica, "a")
    replica.close()


def test_an_idle_worker_wakes_when_a_job_comes(store: Store) -> None:
    assert not store.wait(0.01)
    threading.Timer(0.05, add, (Store(store._settings), "a")).start()

    assert store.wait(10)
    assert [job.id for job in take(store)] == ["a"]


@pytest.mark.parametrize("fault", [AttributeError, TypeError, ValueError])
def test_whatever_the_client_says_of_the_socket_that_went_away_is_an_interruption_and_else_a_bug(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    """A signal may come at any point of the client's own work on its socket."""
    sleeper = Sleeper(valkey_url)

    def stumble(*_: object, **__: object) -> None:
        raise fault("the socket is gone")

    monkeypatch.setattr(sleeper._client, "blpop", stumble)
    with pytest.raises(fault):
        sleeper.wait(["nothing"], 0.1)
    sleeper.interrupt()
    with pytest.raises(StoreUnavailable, match="interrupted"):
        sleeper.wait(["nothing"], 0.1)
    sleeper.close()


def test_a_wait_that_is_interrupted_ends_at_once_and_the_next_one_works(store: Store) -> None:
    threading.Timer(0.1, store.interrupt).start()
    start = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.wait(2)

    assert time.monotonic() - start < 1
    assert not store.wait(0.01)
