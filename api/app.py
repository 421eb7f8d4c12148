"""The app, and its one table from error class to HTTP status. No other file chooses the status of an error."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from api import errors as ours
from api.bodies import body_schemas
from api.complaints import complaint
from api.context import Context
from api.direct import Direct
from api.fleet import Fleet
from api.guard import Guard
from api.held import Held
from api.metrics import Metrics
from api.observe import Observe
from api.problems import MEDIA_TYPE, PROBLEM_REFERENCE, PROBLEM_SCHEMA, Answer, Asked, respond
from api.routes import dead_letters, events, fleet, jobs, predict, state
from api.schema import QUERY_NAMES
from api.settings import ApiSettings
from core import errors
from core.errors import DeadlineUnreachable, HeadraceError, QueueFull
from jobs.async_store import AsyncStore

#: The nearest class counts: a leaf without a row is answered as its parent is.
ANSWERS: Mapping[type[HeadraceError], Answer] = {
    HeadraceError: Answer(status=500, text="something went wrong on our side; the server's log has it"),
    errors.RequestError: Answer(status=422),
    errors.ModelError: Answer(status=503, retry_after=30),
    errors.ModelNotFound: Answer(status=404),
    errors.JobError: Answer(status=409, repeat=False),
    errors.JobNotFound: Answer(status=404),
    errors.JobTimeout: Answer(status=504, repeat=False),
    errors.QueueFull: Answer(status=429),  # Retry-After is the error's own estimate
    # The client's own move: a repeat would have a later deadline, so nobody repeats it unasked. Retry-After as above.
    errors.DeadlineUnreachable: Answer(status=429, repeat=False),
    errors.StoreError: Answer(status=503, retry_after=2, text="the job store is unavailable; try again"),
    errors.StoreFull: Answer(status=503, retry_after=5),
    errors.NotDurable: Answer(status=503, retry_after=1),
    errors.UnsafeServer: Answer(status=503, retry_after=60, text="the job store cannot keep a job safe as configured"),
    errors.EngineError: Answer(status=500, repeat=False),
    ours.Unauthorized: Answer(status=401),
    ours.HostNotAllowed: Answer(status=403),
    ours.OriginNotAllowed: Answer(status=403),
    ours.RouteNotFound: Answer(status=404),
    ours.MethodNotAllowed: Answer(status=405),
    ours.BodyTooLarge: Answer(status=413),
    ours.MalformedBody: Answer(status=400),
    ours.IdReused: Answer(status=422, repeat=False),
    ours.TooManyStreams: Answer(status=503, retry_after=5),
    ours.NoWorker: Answer(status=503, retry_after=5),
    ours.StillRunning: Answer(status=504, repeat=False),  # a repeat would make a second job
    ours.JobNotSucceeded: Answer(status=500, repeat=False),  # unless the job's own code has a row: _answer
    ours.Unexpected: Answer(status=500),
}

#: How a job that ended without a result is answered where the answer was waited for, if its code is no error of ours.
ENDED: Mapping[str, Answer] = {
    "job_cancelled": Answer(status=409, repeat=False),
    "job_expired": Answer(status=504, repeat=False),
}

ROUTES = (jobs, events, dead_letters, predict, fleet, state)
EXPOSED_HEADERS = ("location", "retry-after", "preference-applied", "x-request-id", "x-should-retry")
ALLOWED_HEADERS = ("authorization", "content-type", "last-event-id", "prefer", "x-api-key", "x-request-id")


def create_app(settings: ApiSettings, store: AsyncStore) -> FastAPI:
    """The whole API in front of ``store``; ``app.state.context.held.close()`` ends what is held open.

    Raises:
        ValueError: the key cannot be used.
    """
    metrics = Metrics()
    app = FastAPI(
        title="Headrace",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        middleware=_middleware(settings, metrics),
        telemetry={"tracing": False},
    )
    app.state.context = Context(
        settings=settings,
        store=store,
        fleet=Fleet(store, settings.model),
        held=Held(settings.max_streams),
        metrics=metrics,
        hosts=settings.hosts,
    )
    for routes in ROUTES:
        app.include_router(routes.router)
    app.add_exception_handler(HeadraceError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    _describe(app)
    return app


def answer_to(error: HeadraceError) -> Answer:
    """The row of ``ANSWERS`` that fits ``error`` best."""
    if isinstance(error, ours.JobNotSucceeded):
        row = ENDED.get(error.code) or _by_code(HeadraceError, error.code)
        return row or ANSWERS[ours.JobNotSucceeded]
    row = _row(type(error))
    if isinstance(error, QueueFull | DeadlineUnreachable):
        return dataclasses.replace(row, retry_after=min(max(error.retry_after_seconds, 1), 120))
    return row


def refuse(scope: Scope, error: HeadraceError) -> Response:
    """``error`` as the response to the request in ``scope``."""
    asked = Asked(request_id=scope["state"]["request_id"], path=scope["path"])
    return respond(error, answer_to(error), asked, _headers(error))


def _row(kind: type[HeadraceError]) -> Answer:
    return next(ANSWERS[cls] for cls in kind.__mro__ if cls in ANSWERS)


def _by_code(root: type[HeadraceError], code: str) -> Answer | None:
    """The row of the class that carries ``code``; a job's error is stored as its code."""
    for cls in root.__subclasses__():
        if cls.code == code and cls is not HeadraceError:
            return _row(cls)
        found = _by_code(cls, code)
        if found is not None:
            return found
    return None


def _headers(error: HeadraceError) -> dict[str, str]:
    if isinstance(error, ours.Unauthorized):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, ours.MethodNotAllowed):
        return {"allow": error.allowed}
    if isinstance(error, ours.BodyTooLarge):
        return {"connection": "close"}  # little of the rest of the body is read (``api.guard``)
    if isinstance(error, ours.StillRunning | ours.JobNotSucceeded | ours.IdReused):
        return {"location": f"/v1/jobs/{error.job_id}"}
    return {}


def _on_error(request: Request, error: Exception) -> Response:
    return refuse(request.scope, _translated(error, request.url.path))


def _translated(error: Exception, path: str) -> HeadraceError:
    """FastAPI's and Starlette's own errors in our words."""
    if isinstance(error, HeadraceError):
        return error
    if isinstance(error, RequestValidationError):
        return complaint(error.errors(), QUERY_NAMES)
    if isinstance(error, HTTPException) and error.status_code == 405:
        return ours.MethodNotAllowed(_methods(path))
    if isinstance(error, HTTPException) and error.status_code == 404:
        return ours.RouteNotFound()
    return ours.MalformedBody("it could not be read") if isinstance(error, HTTPException) else ours.Unexpected()


def _methods(path: str) -> str:
    """What ``path`` takes; Starlette's own answer names the first of its routes only."""
    every = [route for routes in ROUTES for route in routes.router.routes if isinstance(route, APIRoute)]
    return ", ".join(sorted({name for route in every if route.path_regex.match(path) for name in route.methods or ()}))


def _middleware(settings: ApiSettings, metrics: Metrics) -> list[Middleware]:
    """From the outside in."""
    layers = [Middleware(Observe, metrics=metrics, refuse=refuse)]
    if settings.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=ALLOWED_HEADERS,
            expose_headers=EXPOSED_HEADERS,
        )
        layers.append(cors)
    settings.read_key()  # Starlette builds the layers with the first request: a bad key must show now
    route = next(route for route in jobs.router.routes if isinstance(route, APIRoute) and route.endpoint is jobs.submit)
    guard, direct = Middleware(Guard, settings=settings, refuse=refuse), Middleware(Direct, route=route, refuse=refuse)
    return [*layers, guard, direct]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.context.held.close()


def _describe(app: FastAPI) -> None:
    """Put into the OpenAPI document what FastAPI cannot know: bodies read by ourselves, and the shape of errors."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        schemas = document["components"]["schemas"]
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        schemas.update(body_schemas(), Problem=PROBLEM_SCHEMA)
        problem = {"description": "Any error", "content": {MEDIA_TYPE: {"schema": {"$ref": PROBLEM_REFERENCE}}}}
        for operation in (each for path in document["paths"].values() for each in path.values()):
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = problem
        return document

    app.openapi = openapi  # type: ignore[method-assign]
