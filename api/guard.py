"""Who may come in, and how much they may bring: host, origin, key and body size. Denies by default; knows no routes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import BodyTooLarge, HostNotAllowed, OriginNotAllowed, Unauthorized
from api.observe import Refuse
from api.settings import ApiSettings
from core.errors import HeadraceError

OPEN_PATHS = frozenset({"/health", "/ready"})  #: the only paths that never want a key
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LINGER_SECONDS = 1.0  #: for the rest of a body that is too large
LINGER_BYTES = 1_048_576  #: of it
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """ASGI middleware: refuses before a route is looked for."""

    def __init__(self, app: ASGIApp, *, settings: ApiSettings, refuse: Refuse) -> None:
        self._app = app
        self._refuse = refuse
        self._max_bytes = settings.max_body_bytes
        self._origins = frozenset(settings.origins)
        self._hosts = LOCAL_HOSTS | {settings.host.strip("[]").lower()}
        key = settings.read_key()
        self._digest = _digest(key) if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = self._objection(scope, headers)
        bounded = _Bounded(receive, send, self._max_bytes, over=isinstance(error, BodyTooLarge))
        if error is not None:
            await self._refuse(scope, error)(scope, receive, bounded.send)
            return
        await self._app(scope, bounded.receive, bounded.send)

    def _objection(self, scope: Scope, headers: Headers) -> HeadraceError | None:
        if self._digest is None:
            if _host(headers.get("host", "")) not in self._hosts:
                return HostNotAllowed()
            if scope["method"] not in SAFE_METHODS and not self._same_site(headers):
                return OriginNotAllowed()
        elif scope["path"] not in OPEN_PATHS and not self._knows(headers):
            return Unauthorized()
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            return BodyTooLarge(self._max_bytes)
        return None

    def _knows(self, headers: Headers) -> bool:
        """The request carries the key; takes as long for a wrong one as for a right one."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(_digest(sent), self._digest or b"")

    def _same_site(self, headers: Headers) -> bool:
        """No browser sent this from a page of another origin; programs send neither header."""
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        return origin in self._origins or "*" in self._origins or urlsplit(origin).netloc == headers.get("host")


class _Bounded:
    """Counts a body's bytes as they come, so that one without a declared length is bounded too."""

    def __init__(self, receive: Receive, send: Send, limit: int, *, over: bool) -> None:
        self._receive = receive
        self._send = send
        self._limit = limit
        self._seen = 0
        self._over = over  # the connection is closed behind the answer

    async def receive(self) -> Message:
        """The next message.

        Raises:
            BodyTooLarge
        """
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            self._over = True
            raise BodyTooLarge(self._limit)
        return message

    async def send(self, message: Message) -> None:
        """Pass on; a connection that is to be closed stays open a little while its client still sends: it would be
        reset, and the client would not see the answer (RFC 9112, section 9.6)."""
        if self._over and message["type"] == "http.response.body" and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            await self._read_some_more()
            message = {**message, "body": b""}
        await self._send(message)

    async def _read_some_more(self) -> None:
        read = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while read < LINGER_BYTES:
                    message = await self._receive()
                    read += len(message.get("body", b""))
                    if not message.get("more_body"):
                        break


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
