"""The short way of a submission: past the web framework's search for the route and for what its endpoint wants.

That search is a quarter of what this process does for a submission. The endpoint is the route's own, and is called with
the same; a header too long is left to the framework, which refuses it. Knows no status and no field.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from api.bodies import job_body
from api.context import context
from api.observe import Refuse
from api.prefer import MAX_HEADER_CHARACTERS
from core.errors import HeadraceError


class Direct:
    """ASGI middleware, the innermost: answers ``route``, whose endpoint takes context, job and ``Prefer``."""

    def __init__(self, app: ASGIApp, *, route: Route, refuse: Refuse) -> None:
        self._app = app
        self._route = route
        self._methods = route.methods or set()
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._route.path or scope["method"] not in self._methods:
            await self._app(scope, receive, send)
            return
        prefer = Headers(scope=scope).get("prefer", "")
        if len(prefer) > MAX_HEADER_CHARACTERS:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route
        response = await self._answer(Request(scope, receive), prefer)
        await response(scope, receive, send)

    async def _answer(self, request: Request, prefer: str) -> Response:
        try:
            response: Response = await self._route.endpoint(await context(request), await job_body(request), prefer)
        except HeadraceError as error:
            return self._refuse(request.scope, error)
        return response
