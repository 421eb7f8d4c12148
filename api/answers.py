"""JSON answers, written without a detour through FastAPI's encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from core.bounds import Wire


def json_answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``content`` as JSON; a number JSON does not have becomes null."""
    return Response(to_json(content, inf_nan_mode="null"), status, headers, "application/json")


def list_answer(items: list[Wire], **more: Any) -> Response:
    """The list shape every collection has."""
    return json_answer({"object": "list", "data": items, **more})
