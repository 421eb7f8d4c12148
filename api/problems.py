"""An error as one JSON body: RFC 9457's members and OpenAI's ``error`` at once. The status is for ``api/app.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from core.errors import HeadraceError

MEDIA_TYPE = "application/problem+json"
MAX_INSTANCE_CHARACTERS = 256
PROBLEM_REFERENCE = "#/components/schemas/Problem"
PROBLEM_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance", "request_id", "error"],
    "properties": {
        **{name: {"type": "string"} for name in ("type", "title", "detail", "instance", "request_id")},
        "status": {"type": "integer"},
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                **{name: {"type": "string"} for name in ("message", "type", "code")},
                "param": {"type": ["string", "null"]},
            },
        },
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How an error is answered."""

    status: int
    retry_after: int | None = None  #: seconds, 1 … 120: clients give up above that
    repeat: bool | None = None  #: sent as x-should-retry where a client's own rule would be wrong
    text: str | None = None  #: shown instead of the message, where that may say what is nobody's business


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The request an error answers."""

    request_id: str
    path: str


def problem(error: HeadraceError, answer: Answer, asked: Asked) -> dict[str, Any]:
    """The body: problem members on top, the same facts under ``error`` for OpenAI's clients."""
    message = answer.text or str(error)
    return {
        "type": f"urn:headrace:error:{error.code}",
        "title": HTTPStatus(answer.status).phrase,
        "status": answer.status,
        "detail": message,
        "instance": asked.path[:MAX_INSTANCE_CHARACTERS],
        "request_id": asked.request_id,
        "error": {"message": message, "type": openai_type(answer.status), "param": error.param, "code": error.code},
    }


def respond(error: HeadraceError, answer: Answer, asked: Asked, headers: Mapping[str, str]) -> Response:
    """The whole response, with the headers that retrying clients read."""
    every = dict(headers)
    if answer.retry_after is not None:
        every["retry-after"] = str(answer.retry_after)
    if answer.repeat is not None:
        every["x-should-retry"] = "true" if answer.repeat else "false"
    body = to_json(problem(error, answer, asked), inf_nan_mode="null")
    return Response(body, status_code=answer.status, headers=every, media_type=MEDIA_TYPE)


def openai_type(status: int) -> str:
    """OpenAI's coarse word for a status."""
    if status >= 500:
        return "server_error"
    names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return names.get(status, "invalid_request_error")
