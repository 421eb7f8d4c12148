"""The proxy that the fault tests stand on: it passes everything on, and spoils exactly what it was told to."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import redis

from core.errors import StoreUnavailable
from jobs.store import Store
from tests.jobs_world import add, audit, born, settings, take
from tests.proxy import Held, Proxy, cut, kill, proxied


@pytest.fixture
def proxy(valkey_url: str) -> Iterator[Proxy]:
    with proxied(valkey_url) as proxy:
        yield proxy


@pytest.mark.parametrize("protocol", [2, 3])
def test_it_is_the_server_as_far_as_a_client_can_tell(proxy: Proxy, valkey: redis.Redis, protocol: int) -> None:
    with redis.Redis.from_url(proxy.url, protocol=protocol) as client:
        client.hset("h", mapping={str(n): "x" * n for n in range(200)})
        with client.pipeline(transaction=True) as pipeline:
            pipeline.rpush("l", b"\r\n", b"")
            pipeline.lrange("l", 0, -1)
            pipeline.get("nothing")
            answers = pipeline.execute()
        with client.pubsub() as pubsub:
            pubsub.subscribe("c")
            heard = [pubsub.get_message(timeout=5)]
            valkey.publish("c", "hello")
            heard.append(pubsub.get_message(timeout=5))

        assert client.hgetall("h") == valkey.hgetall("h")
        assert answers == [2, [b"\r\n", b""], None]
        assert [message["data"] for message in heard if message] == [1, b"hello"]


def test_scripts_go_by_their_name_and_a_rule_takes_the_one_it_means(proxy: Proxy, valkey: redis.Redis) -> None:
    store = Store(settings(proxy.url))
    born(store)
    rule = proxy.after("submit", cut, skip=1)
    add(store, "a")
    with pytest.raises(StoreUnavailable):
        add(store, "b")
    add(store, "c")

    assert rule.happened.is_set()
    assert proxy.seen["submit"] >= 3
    assert {job.id for job in take(store)} == {"a", "b", "c"}
    assert audit(valkey) == []
    store.close()


def test_what_is_cut_before_the_server_has_it_is_not_done(proxy: Proxy, valkey: redis.Redis) -> None:
    store = Store(settings(proxy.url))
    proxy.before("submit", cut)
    with pytest.raises(StoreUnavailable):
        add(store, "a")

    assert not valkey.exists("rq:job:a")
    store.close()


def test_a_reply_is_held_until_it_is_let_go(proxy: Proxy) -> None:
    held, answers = Held(), list[bool]()
    proxy.after("PING", held)
    with redis.Redis.from_url(proxy.url) as client:
        thread = threading.Thread(target=lambda: answers.append(client.ping()))
        thread.start()
        assert held.holding.wait(5)
        thread.join(0.2)
        assert answers == []
        held.free.set()
        thread.join(5)

    assert answers == [True]


def test_the_process_that_spoke_is_the_one_that_dies(proxy: Proxy, valkey: redis.Redis) -> None:
    proxy.after("SET", kill)
    program = "import redis, sys; redis.Redis.from_url(sys.argv[1]).set('a', 1)"
    run = subprocess.run([sys.executable, "-c", program, proxy.url], timeout=20)

    assert run.returncode == -9
    assert valkey.get("a") == b"1"
