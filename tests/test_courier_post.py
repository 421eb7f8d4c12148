"""One attempt at a callback: whom it calls, whom it never calls, and how it reads what comes back."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from courier.guard import is_public
from courier.post import Answer, Poster
from jobs.outbox import Callback
from jobs.webhooks import OFF, REFUSED, AllowedHosts, NotAllowed
from tests.courier_world import KEY, Receiver, receiving, verify

CERTIFICATE = Path(__file__).parent / "golden" / "hooks.example.pem"


class Names:
    """A name service that answers as it is told, and counts."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.asked: list[tuple[str, int]] = []
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return next(self._answers)


def send(url: str, hosts: AllowedHosts, *, names: Names | None = None, seconds: float = 2, times: int = 1) -> Answer:
    """The answer to the last of so many attempts, made by one poster."""
    callback = Callback(id="evt_1", attempt=1, tries=1, job_id="j", url=url, type="job.failed", ended_at=1)

    async def run() -> Answer:
        async with Poster(hosts, [KEY], seconds, resolve=names or Names(["127.0.0.1"])) as poster:
            return [await poster.send(callback) for _ in range(times)][-1]

    return asyncio.run(run())


def here(receiver: Receiver) -> AllowedHosts:
    return AllowedHosts("", receiver.host)


def test_a_receiver_gets_one_signed_post_with_the_name_it_was_called_by() -> None:
    with receiving() as receiver:
        hosts = AllowedHosts("", f"http://hooks.example:{receiver.port}")
        answer = send(f"http://HOOKS.example:{receiver.port}/a%20b?c=d", hosts, names=Names(["127.0.0.1"]))
    [delivery] = receiver.got

    assert answer.delivered
    assert verify(delivery)
    assert not verify(delivery, bytes(32))
    assert delivery.path == "/a%20b?c=d"
    assert delivery.headers["host"] == f"hooks.example:{receiver.port}"
    assert delivery.headers["content-type"] == "application/json"


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_any_2xx_is_success(status: int) -> None:
    with receiving(lambda _: (status, {})) as receiver:
        assert send(receiver.url(), here(receiver)).delivered


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_and_nobody_follows_it(status: int) -> None:
    with receiving() as other, receiving(lambda _: (status, {"location": other.url()})) as receiver:
        answer = send(receiver.url(), AllowedHosts("", f"{receiver.host},{other.host}"))

        assert (answer.delivered, answer.gone, len(receiver.got), other.got) == (False, False, 1, [])


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_any_other_answer_is_a_failure_that_may_pass(status: int) -> None:
    with receiving(lambda _: (status, {})) as receiver:
        assert send(receiver.url(), here(receiver)) == Answer(why=str(status))


def test_gone_means_never_again() -> None:
    with receiving(lambda _: (410, {})) as receiver:
        assert send(receiver.url(), here(receiver)).gone


@pytest.mark.parametrize(
    ("status", "text", "low", "high"),
    [
        (429, "120", 120, 120),
        (503, "7", 7, 7),
        (500, "120", 0, 0),
        (503, "soon", 0, 0),
        (503, "-5", 0, 0),
        (429, "Fri, 31 Dec 1999 23:59:59 GMT", 0, 0),
        (429, "Thu, 31 Dec 2099 23:59:59 GMT", 1e9, 1e10),
    ],
)
def test_a_busy_receiver_says_how_long_it_wants_to_be_left_alone(
    status: int, text: str, low: float, high: float
) -> None:
    with receiving(lambda _: (status, {"retry-after": text})) as receiver:
        assert low <= send(receiver.url(), here(receiver)).retry_after_seconds <= high


def test_a_receiver_that_hangs_or_drips_is_left_when_the_time_is_over() -> None:
    with receiving(lambda _: None) as receiver, dripping() as port:
        for host in (receiver.host, f"http://127.0.0.1:{port}"):
            start = time.monotonic()
            answer = send(f"{host}/", AllowedHosts("", host), seconds=0.2)

            assert answer == Answer(why="TimeoutError")
            assert time.monotonic() - start < 2


@contextmanager
def dripping() -> Iterator[int]:
    """A server that answers a byte every 50 ms; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            client, _ = server.accept()
            with client:
                for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 1_000:
                    try:
                        client.sendall(bytes([byte]))
                    except OSError:
                        return
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        yield server.getsockname()[1]


def test_a_body_without_end_is_not_read() -> None:
    sent: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pour() -> None:
            client, _ = server.accept()
            with client:
                client.recv(65_536)
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                try:
                    while len(sent) < 10_000:
                        client.sendall(bytes(65_536))
                        sent.append(1)
                except OSError:
                    return

        threading.Thread(target=pour, daemon=True).start()
        host = f"http://127.0.0.1:{server.getsockname()[1]}"

        assert send(f"{host}/", AllowedHosts("", host)).delivered
        assert len(sent) < 1_000


def test_nobody_there_is_a_failure_like_any_other() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"http://127.0.0.1:{server.getsockname()[1]}"

    assert send(f"{host}/", AllowedHosts("", host)) == Answer(why="ConnectError")


def test_the_next_address_of_a_name_is_tried_where_nobody_answers_at_the_first() -> None:
    with receiving() as receiver:
        hosts = AllowedHosts("", f"http://hooks.example:{receiver.port}")

        assert send(
            f"http://hooks.example:{receiver.port}/", hosts, names=Names(["127.0.0.2", "::1", "127.0.0.1"])
        ).delivered


# -- forged requests


@pytest.mark.parametrize("found", [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:127.0.0.1"], []])
def test_a_name_that_leads_inside_is_not_called_unless_the_operator_vouches_for_it(found: list[str]) -> None:
    with receiving() as receiver:
        url, entry = f"http://hooks.example:{receiver.port}/", f"http://hooks.example:{receiver.port}"

        assert send(url, AllowedHosts(entry), names=Names(found)) == Answer(why="NotAllowed")
        assert receiver.got == []
        if found[-1:] == ["127.0.0.1"]:
            assert send(url, AllowedHosts("", entry), names=Names(found[-1:])).delivered


def test_a_name_is_looked_up_once_and_the_address_that_was_checked_is_called() -> None:
    with receiving() as receiver:
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        entry = f"http://hooks.example:{receiver.port}"

        assert send(f"{entry}/", AllowedHosts("", entry), names=names).delivered
        assert names.asked == [("hooks.example", receiver.port)]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.88.99.1", "198.18.0.1"),
        *("::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"),
        *("64:ff9b:1::1", "2002:a00:1::1", "2001::1", "100::1", "2001:db8::1"),
    ],
)
def test_an_address_that_may_lead_inside_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


LISTED = AllowedHosts(
    "hooks.example, other.example:8443, http://plain.example, [2606:4700::1]", "http://127.0.0.1:9000"
)


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("https://hooks.example", ("https", "hooks.example", 443, "/", "hooks.example", False)),
        ("HTTPS://Hooks.Example:443/a?b=c", ("https", "hooks.example", 443, "/a?b=c", "hooks.example", False)),
        ("https://other.example:8443/", ("https", "other.example", 8443, "/", "other.example:8443", False)),
        ("http://plain.example/", ("http", "plain.example", 80, "/", "plain.example", False)),
        ("https://[2606:4700::1]/", ("https", "2606:4700::1", 443, "/", "[2606:4700::1]", False)),
        ("http://127.0.0.1:9000/x", ("http", "127.0.0.1", 9000, "/x", "127.0.0.1:9000", True)),
    ],
)
def test_an_address_at_a_listed_host_is_taken_apart(url: str, where: tuple[str, str, int, str, str, bool]) -> None:
    target = LISTED.target(url)

    assert (target.scheme, target.host, target.port, target.path, target.netloc, target.private) == where


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/",
        "https://plain.example/",
        "https://hooks.example:8443/",
        "https://other.example/",
        "https://hooks.example.evil.example/",
        "https://evil.example/?https://hooks.example/",
        "https://user@hooks.example/",
        "https://user:password@hooks.example/",
        "https://hooks.example@evil.example/",
        "https://hooks.example#@evil.example/",
        "https://hooks.example\\@evil.example/",
        "https://hooks.example\n.evil.example/",
        "https://hooks.example /",
        "https://hooks.example/a b",
        "https://hooks.example/\\evil.example/",
        "https://hooks.example/<a>",
        "https://hooks.example:0/",
        "https://hooks.example:99999/",
        "https://hooks.example./",
        "https://hooks.еxample/",
        "https://127.0.0.1/",
        "https://2130706433/",
        "https:///path",
        "//hooks.example/",
        "ftp://hooks.example/",
        "file:///etc/passwd",
        "hooks.example",
        "https://[::1",
        "https://hooks.example/" + "x" * 2_048,
        "",
    ],
)
def test_any_other_address_is_refused_with_one_and_the_same_text(url: str) -> None:
    with pytest.raises(NotAllowed) as refused:
        LISTED.target(url)

    assert str(refused.value) == REFUSED


def test_nobody_is_called_where_the_list_is_empty() -> None:
    with pytest.raises(NotAllowed) as refused:
        AllowedHosts().target("https://hooks.example/")

    assert str(refused.value) == OFF
    assert "webhook_hosts" in OFF


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver, receiving(lambda _: (500, {})) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.host)

        assert send(receiver.url(), here(receiver)).delivered
        assert proxy.got == []


def test_each_delivery_has_a_connection_of_its_own() -> None:
    with receiving() as receiver:
        send(receiver.url(), here(receiver), times=3)

    assert len({delivery.client for delivery in receiver.got}) == 3


def test_the_certificate_must_be_that_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with receiving(certificate=CERTIFICATE) as receiver:
        right, wrong = f"hooks.example:{receiver.port}", f"other.example:{receiver.port}"

        assert send(f"https://{right}/", AllowedHosts("", right)).delivered
        assert send(f"https://{wrong}/", AllowedHosts("", wrong)) == Answer(why="ConnectError")
        assert len(receiver.got) == 1
        monkeypatch.delenv("SSL_CERT_FILE")
        assert not send(f"https://{right}/", AllowedHosts("", right)).delivered
