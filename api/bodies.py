"""Request bodies as route dependencies: read in one pass, described in OpenAPI. Knows no routes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api.complaints import read_json
from api.schema import (
    JOB_BODY,
    JOB_NAMES,
    RETRY_BODY,
    RETRY_NAMES,
    TEXT_BODY,
    TEXT_NAMES,
    GenerateBody,
    PredictBody,
    RetryBody,
    TextBody,
)

_MODELS: tuple[type[BaseModel], ...] = (GenerateBody, PredictBody, TextBody, RetryBody)
_REFERENCE = "#/components/schemas/{model}"


async def job_body(request: Request) -> GenerateBody | PredictBody:
    return read_json(JOB_BODY, await request.body(), JOB_NAMES)


async def _text_body(request: Request) -> TextBody:
    return read_json(TEXT_BODY, await request.body(), TEXT_NAMES)


async def _retry_body(request: Request) -> RetryBody:
    return read_json(RETRY_BODY, await request.body() or b"{}", RETRY_NAMES)


AJob = Annotated[GenerateBody | PredictBody, Depends(job_body)]
AText = Annotated[TextBody, Depends(_text_body)]
ARetry = Annotated[RetryBody, Depends(_retry_body)]


def described(*models: type[BaseModel], required: bool = True) -> dict[str, Any]:
    """``openapi_extra`` for a route whose body is one of ``models``."""
    references = [{"$ref": _REFERENCE.format(model=model.__name__)} for model in models]
    schema = references[0] if len(references) == 1 else {"oneOf": references, "discriminator": {"propertyName": "kind"}}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def body_schemas() -> dict[str, Any]:
    """The components that ``described`` refers to."""
    _, schema = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_REFERENCE)
    found: dict[str, Any] = schema["$defs"]
    return found
