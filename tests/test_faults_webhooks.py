"""Receivers that hang, are dead, fail or redirect, couriers that die: jobs go on, and whoever can be told is told."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import redis

from core.request import Request, SamplingParams
from jobs import commands, keys
from jobs.job import Job, JobState, NewJob, Webhook
from jobs.memory import MemoryReport
from jobs.runner import Runner
from jobs.settings import StoreSettings
from tests.conftest import Server
from tests.courier_world import SECRET, Delivery, Receiver, Reply, courier, receiving, verify
from tests.faults_world import restart, restartable
from tests.jobs_world import audit
from tests.worker_world import WorkerProcess, eventually, worker

OK: Reply = (204, {})
BROKEN: Reply = (500, {})
MANY = ",".join(["0.2"] * 100)
FEW = "0.05,0.05"  #: three attempts
TOKENS, ROWS = 100, 8
numbers = itertools.count()


def ask(client: redis.Redis, *urls: str | None, **params: int) -> list[str]:
    """A job for each address; their ids."""
    ids = [f"job-{next(numbers)}" for _ in urls]
    for job_id, url in zip(ids, urls, strict=True):
        request = Request(prompt=job_id, params=SamplingParams.from_wire({"max_tokens": 5, **params}))
        new = NewJob(id=job_id, request=request, webhook=url)
        Runner(client, 60).run(commands.submit(new, StoreSettings(), MemoryReport(used_bytes=0, limit_bytes=0)))
    return ids


def end(client: redis.Redis, *urls: str) -> list[str]:
    """A job for each address that has ended; their ids."""
    ids = ask(client, *urls)
    Runner(client, 60).answers([commands.cancel(job_id) for job_id in ids])
    return ids


def outlast_leases(client: redis.Redis) -> None:
    """What couriers have, or had, is anybody's."""
    waiting: Any = client.zrange(keys.OUTBOX, 0, -1)
    client.zadd(keys.OUTBOX, dict.fromkeys(waiting, time.time() * 1000))


def get(client: redis.Redis, job_id: str) -> Job:
    return Runner(client, 60).run(commands.get(job_id)).job


def webhook(client: redis.Redis, job_id: str) -> Webhook:
    found = get(client, job_id).webhook
    assert found is not None
    return found


def succeed(client: redis.Redis, ids: Sequence[str], log: Path) -> None:
    """Wait until all have."""
    eventually(lambda: all(get(client, each).state is JobState.SUCCEEDED for each in ids), f"end of each of {ids}", log)


def told(client: redis.Redis, ids: Sequence[str], state: str, log: Path) -> None:
    """Wait until all callbacks are in this state."""

    def count() -> bool:
        return all(webhook(client, job_id).state == state for job_id in ids)

    eventually(count, f"{state} for each of {ids}", log)


def steps(client: redis.Redis, process: WorkerProcess, tokens: int) -> int:
    """How many the engine has taken, once it says that it has drawn so many tokens."""

    def taken() -> int:
        [card] = Runner(client, 60).run(commands.workers())
        return int(card.stats.get("steps", 0)) if card.stats.get("generated_tokens") == tokens else 0

    return int(eventually(taken, f"{tokens} tokens", process.log))


def has_tcp(pid: int) -> bool:
    """The process has a connection over TCP, to whomever."""
    inodes = {os.readlink(path)[8:-1] for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    return bool(inodes & {line.split()[9] for table in tables for line in table})


def by_job(deliveries: Iterable[Delivery]) -> dict[str, list[Delivery]]:
    found: dict[str, list[Delivery]] = {}
    for delivery in deliveries:
        found.setdefault(delivery.event["data"]["id"], []).append(delivery)
    return found


def test_the_engine_decodes_on_while_receivers_hang_and_each_end_is_told_once_they_recover(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    with worker(valkey_url, tmp_path, instant_step_ms=2) as process, receiving(lambda _: None) as receiver:
        ask(valkey, None, max_tokens=TOKENS, n=ROWS)
        undisturbed = steps(valkey, process, ROWS * TOKENS)
        settings = {"webhook_retry_seconds": MANY, "webhook_timeout_seconds": 0.5}
        with courier(valkey_url, tmp_path, receiver.host, **settings):
            first = ask(valkey, *[receiver.url()] * ROWS)
            eventually(lambda: len(by_job(receiver.got)) == ROWS, "deliveries under way", tmp_path / "courier.log")
            before = steps(valkey, process, ROWS * (TOKENS + 5))
            [second] = ask(valkey, receiver.url(), max_tokens=TOKENS, n=ROWS)
            disturbed = steps(valkey, process, ROWS * (2 * TOKENS + 5)) - before
            succeed(valkey, [second], process.log)
            still = [webhook(valkey, job_id).state for job_id in first]
            tcp = has_tcp(process.engine_pid())
            receiver.answer = lambda _: OK
            told(valkey, first, "delivered", tmp_path / "courier.log")
            eventually(lambda: not valkey.exists(keys.OUTBOX), "an empty outbox", tmp_path / "courier.log")

    assert still == ["pending"] * ROWS  # the jobs behind them ended while nobody had been told anything
    assert disturbed <= undisturbed * 1.02
    assert not tcp
    assert len(by_job(receiver.got)) == ROWS + 1
    for job_id, deliveries in by_job(receiver.got).items():
        assert all(map(verify, deliveries)), job_id
        assert len({(each.id, each.body) for each in deliveries}) == 1, job_id
        assert job_id not in first or len(deliveries) >= 2
    assert audit(valkey) == []


def test_a_receiver_that_never_says_yes_is_given_up_with_a_record_and_may_be_told_again(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with receiving() as other, receiving(_by_path(other)) as receiver:
        paths = ("/broken?token=canary", "/elsewhere", "/hang", "/gone")
        ids = end(valkey, *map(receiver.url, paths), f"{dead}/", "https://not.listed/")
        hosts, log = (receiver.host, other.host, dead), tmp_path / "courier.log"
        with courier(valkey_url, tmp_path, *hosts, webhook_retry_seconds=FEW, webhook_timeout_seconds=0.2):
            told(valkey, ids, "failed", log)
            records = [webhook(valkey, job_id) for job_id in ids]
            attempts = {path: sum(each.path == path for each in receiver.got) for path in paths}
            receiver.answer = lambda _: OK
            again = Runner(valkey, 60).run(commands.resend(ids[0])).webhook
            told(valkey, ids[:1], "delivered", log)

    assert [record.attempts for record in records] == [3, 3, 3, 1, 3, 3]
    assert {record.last_error for record in records} == {"the receiver did not answer with success"}
    assert attempts == dict(zip(paths, (3, 3, 3, 1), strict=True))
    assert other.got == []
    assert again is not None
    assert {again.id} == {each.id for each in receiver.got if each.path == paths[0]}
    assert webhook(valkey, ids[0]).attempts == 4
    text = log.read_text()
    assert "given up" in text
    assert not [word for word in ("canary", SECRET, SECRET[6:], "/elsewhere") if word in text]
    assert audit(valkey) == []


def _by_path(other: Receiver) -> Any:
    answers = {"/elsewhere": (302, {"location": other.url()}), "/hang": None, "/gone": (410, {})}
    return lambda delivery: answers.get(delivery.path, BROKEN)


def test_a_courier_that_is_killed_in_mid_delivery_is_followed_by_one_that_says_the_same(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    log = tmp_path / "courier.log"
    with receiving(lambda _: None) as receiver:
        ids = end(valkey, *[receiver.url()] * 6)
        with courier(valkey_url, tmp_path, receiver.host, webhook_timeout_seconds=30) as first:
            eventually(lambda: len(receiver.got) == 6, "deliveries under way", log)
            first.send_signal(signal.SIGKILL)
            first.wait(10)
        with courier(valkey_url, tmp_path, receiver.host):
            receiver.answer = lambda _: OK
            outlast_leases(valkey)
            told(valkey, ids, "delivered", log)

    assert [webhook(valkey, job_id).attempts for job_id in ids] == [2] * 6
    for deliveries in by_job(receiver.got).values():
        assert len(deliveries) == 2
        assert len({(each.id, each.body) for each in deliveries}) == 1
        assert all(map(verify, deliveries))
    assert not valkey.exists(keys.OUTBOX)
    assert audit(valkey) == []


def test_couriers_share_the_outbox_and_say_nothing_twice(valkey: redis.Redis, valkey_url: str, tmp_path: Path) -> None:
    with receiving() as receiver:
        with courier(valkey_url, tmp_path, receiver.host), courier(valkey_url, tmp_path, receiver.host):
            ids = end(valkey, *[receiver.url()] * 60)
            told(valkey, ids, "delivered", tmp_path / "courier.log")

    assert sorted(by_job(receiver.got)) == sorted(ids)
    assert len({each.id for each in receiver.got}) == len(receiver.got) == 60


def test_callbacks_outlive_a_server_that_is_killed(own_valkey: Server, tmp_path: Path) -> None:
    log = tmp_path / "courier.log"
    with restartable(own_valkey) as servers, redis.Redis.from_url(own_valkey.url) as client:
        with receiving(lambda _: BROKEN) as receiver:
            with courier(own_valkey.url, tmp_path, receiver.host, webhook_retry_seconds=MANY) as runs:
                ids = end(client, *[receiver.url()] * 5)
                eventually(lambda: len(by_job(receiver.got)) == 5, "an attempt at each", log)
                servers.append(restart(own_valkey))
                receiver.answer = lambda _: OK
                outlast_leases(client)
                told(client, ids, "delivered", log)
                assert runs.poll() is None
        assert {len({each.id for each in found}) for found in by_job(receiver.got).values()} == {1}
        assert audit(client) == []
