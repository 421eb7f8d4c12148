"""Who may come in, and how much they may bring: host, origin, key and body size. Denies by default; knows no routes."""

from __future__ import annotations

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
        if error is not None:
            await self._refuse(scope, error)(scope, receive, send)
            return
        await self._app(scope, _Bounded(receive, self._max_bytes).receive, send)

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

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0

    async def receive(self) -> Message:
        """The next message.

        Raises:
            BodyTooLarge
        """
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            raise BodyTooLarge(self._limit)
        return message


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
