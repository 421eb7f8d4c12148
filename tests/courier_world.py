"""A small world for tests of callbacks: a receiver that does as it is told, couriers as processes, and a verifier."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.worker_world import environment

KEY = bytes(range(32))
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
#: How a receiver answers: a status, headers; or None, and it hangs until it is told to go on.
Reply = tuple[int, Mapping[str, str]] | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One request as it arrived."""

    path: str
    headers: Mapping[str, str]  #: names in lower case
    body: bytes
    client: int  #: the port it came from

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


class Receiver:
    """An HTTP server on loopback; ``answers`` may be changed at any time."""

    def __init__(self, answer: Callable[[Delivery], Reply], certificate: Path | None = None) -> None:
        self.answer = answer
        self.got: list[Delivery] = []
        self.go_on = threading.Event()  #: those that hang are answered 200
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver._take(self, Delivery(self.path, headers, self.rfile.read(length), self.client_address[1]))

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A courier that was killed hangs up."""

        self._server = Server(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = int(self._server.server_address[1])
        self.host = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def url(self, path: str = "/hook") -> str:
        return f"{self.host}{path}"

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def _take(self, handler: BaseHTTPRequestHandler, delivery: Delivery) -> None:
        self.got.append(delivery)
        reply = self.answer(delivery)
        if reply is None:
            self.go_on.wait(30)
            reply = 200, {}
        status, headers = reply
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", "0")
        handler.end_headers()


@contextmanager
def receiving(
    answer: Callable[[Delivery], Reply] = lambda _: (204, {}), certificate: Path | None = None
) -> Iterator[Receiver]:
    receiver = Receiver(answer, certificate)
    try:
        yield receiver
    finally:
        receiver.close()


@contextmanager
def courier(url: str, folder: Path, *hosts: str, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """A courier process that may call these hosts on loopback; its log is ``folder/courier.log``."""
    quick = {"webhook_timeout_seconds": 1, "webhook_retry_seconds": "0.1,0.1,0.1", "webhook_secret": SECRET}
    environ = environment(url, **{**quick, "webhook_private_hosts": ",".join(hosts), **settings})
    with (folder / "courier.log").open("ab") as out:
        process = subprocess.Popen([sys.executable, "-P", "-m", "courier"], env=environ, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def verify(delivery: Delivery, key: bytes = KEY) -> bool:
    """As a receiver does after the Standard Webhooks' text, by hand."""
    name, sent_at = delivery.headers["webhook-id"], delivery.headers["webhook-timestamp"]
    assert abs(int(sent_at) - time.time()) < 300
    signed = b".".join((name.encode(), sent_at.encode(), delivery.body))
    wanted = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return f"v1,{wanted}" in delivery.headers["webhook-signature"].split(" ")
