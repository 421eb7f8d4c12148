"""The outermost layer: names each request, counts it, logs it without its content, and catches what nobody caught."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import Unexpected
from api.metrics import Metrics
from core.errors import HeadraceError

log = logging.getLogger("headrace.api")

Refuse = Callable[[Scope, HeadraceError], Response]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})


class Observe:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, refuse: Refuse) -> None:
        self._app = app
        self._metrics = metrics
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["request_id"] = name_request(Headers(scope=scope).get("x-request-id", ""))
        answer = _Answer(scope, send, self._metrics)
        try:
            await self._app(scope, receive, answer.send)
        except Exception:  # the one broad except of this process: a client is answered whatever happened
            log.exception("request %s failed", scope["state"]["request_id"])
            if answer.started:
                raise  # nothing can be said any more: the server cuts the connection
            await self._refuse(scope, Unexpected())(scope, receive, answer.send)


def name_request(sent: str) -> str:
    """The client's own request id if it is a sane one, else a new one."""
    return sent if _REQUEST_ID.fullmatch(sent) else f"req_{secrets.token_hex(16)}"


class _Answer:
    """Passes the answer on, and writes it down when its head goes out."""

    def __init__(self, scope: Scope, send: Send, metrics: Metrics) -> None:
        self._scope = scope
        self._send = send
        self._metrics = metrics
        self._began = time.perf_counter()
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            MutableHeaders(scope=message)["x-request-id"] = self._scope["state"]["request_id"]
            self._note(message)
        await self._send(message)

    def _note(self, message: Message) -> None:
        seconds = time.perf_counter() - self._began
        route = getattr(self._scope.get("route"), "path", "unmatched")
        method = self._scope["method"] if self._scope["method"] in _METHODS else "OTHER"
        self._metrics.count(method, route, message["status"], seconds)
        log.info(
            "%s %s %s job=%s bytes=%s %d %.1fms",
            self._scope["state"]["request_id"],
            method,
            route,
            self._job_id(Headers(raw=message["headers"])),
            Headers(scope=self._scope).get("content-length", "-"),
            message["status"],
            seconds * 1000,
        )

    def _job_id(self, answer: Headers) -> str:
        """The job the request was about, from its path or the answer's Location."""
        job_id = self._scope.get("path_params", {}).get("job_id") or answer.get("location", "").rpartition("/")[2]
        return job_id if _JOB_ID.fullmatch(job_id) else "-"  # anything else could forge a line of the log
