"""pydantic's complaints in our words: the field as a dotted path, and its bound. Knows no status and no routes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from api.errors import MalformedBody
from api.schema import Names
from core.bounds import BOUNDS, PRIORITY, refuse_unknown
from core.errors import HeadraceError, InvalidField
from core.request import Kind

T = TypeVar("T")

#: Parts of pydantic's path that are no field of the client's.
_NOT_FIELDS = frozenset({"body", "query", "path", "[key]", *(kind.value for kind in Kind)})
_SUBJECT = re.compile(r"^(Input|String|List|Value|Dictionary|Number|Data)( should|$)")


def read_json(adapter: TypeAdapter[T], raw: bytes, names: Names) -> T:
    """Read one JSON body.

    Raises:
        MalformedBody: not JSON, or nested too deeply.
        RequestError: naming the field and its bound.
    """
    try:
        return adapter.validate_json(raw)
    except ValidationError as error:
        raise complaint(error.errors(include_url=False), names) from None  # its text would repeat the prompt


def complaint(errors: Sequence[Mapping[str, Any]], names: Names) -> HeadraceError:
    """The first of pydantic's errors as one of ours."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return MalformedBody(str(first.get("ctx", {}).get("error", "")))
    path = tuple(str(part) for part in first["loc"] if str(part) not in _NOT_FIELDS)
    try:
        _name_unknown(first, path, names)
        _name_bound(first, path)
    except HeadraceError as error:
        return error
    return InvalidField(".".join(path) or _tag(first) or "body", _text(first))


def _name_unknown(error: Mapping[str, Any], path: tuple[str, ...], names: Names) -> None:
    if error["type"] == "extra_forbidden":
        inside = ".".join(part for part in path[:-1] if not part.isdigit())
        prefix = "".join(f"{part}." for part in path[:-1])
        refuse_unknown({path[-1]: None}, names.get(inside, ()), prefix=prefix)


def _name_bound(error: Mapping[str, Any], path: tuple[str, ...]) -> None:
    if len(path) == 2 and path[0] == "params" and path[1] in BOUNDS:
        BOUNDS[path[1]].check(".".join(path), error["input"])
    if path == ("priority",):
        PRIORITY.check("priority", error["input"])


def _tag(error: Mapping[str, Any]) -> str:
    return "kind" if error["type"].startswith("union_tag") else ""


def _text(error: Mapping[str, Any]) -> str:
    kinds = ", ".join(kind.value for kind in Kind)
    special = {
        "missing": "is required",
        "model_type": "must be a JSON object",
        "model_attributes_type": "must be a JSON object",
        "union_tag_invalid": f"must be one of {kinds}",
        "union_tag_not_found": f"is required: one of {kinds}",
        "string_pattern_mismatch": "must be 1 to 128 letters, digits, - and _",
    }
    return special.get(error["type"]) or _SUBJECT.sub("must", error["msg"])
