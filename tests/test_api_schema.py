"""The HTTP schema promises no more and no less than ``core.request``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic_core import to_json

from api.app import create_app
from api.complaints import read_json
from api.schema import JOB_BODY, JOB_NAMES, Turn
from api.settings import ApiSettings
from core.bounds import BOUNDS, PRIORITY, ROLES
from core.errors import HeadraceError, InvalidField, RequestError, UnknownField
from core.request import Request
from jobs.async_store import AsyncStore
from jobs.settings import StoreSettings

PLAIN = {"kind": "generate", "input": {"prompt": "a"}}


def around(low: float, high: float) -> st.SearchStrategy[object]:
    """Values at, near and across both ends, and of the wrong type."""
    edges = [low, high, low - 1, high + 1, int(low), int(high), int(high) + 1, 0.5, True, "1", None, float(high) + 0.5]
    return st.sampled_from(edges) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


stops = st.one_of(
    st.text(max_size=3), st.lists(st.text(max_size=3), max_size=18), st.just("x" * 257), st.just(["a", 1]), st.none()
)
token_ids = st.lists(st.sampled_from([0, 1, 2**31 - 1, 2**31, -1, 1.0, "1", True, None]), max_size=3)
biases: st.SearchStrategy[object] = st.one_of(
    st.dictionaries(
        st.sampled_from(["0", "7", "07", "-1", "x", "", "٣", str(2**31 - 1), str(2**31), "1" * 30]),
        st.sampled_from([0, -100, 100.0, 100.5, True, "1", None]),
        max_size=2,
    ),
    st.sampled_from([None, [], {str(number): 1 for number in range(301)}]),
)
nested: object = 1
for _ in range(33):
    nested = {"not": nested}
forms: st.SearchStrategy[object] = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "json": st.sampled_from(
            [{}, {"type": "object"}, {"b": 1, "a": [1.5]}, nested, True, None, "{}", {"x": "y" * 65_536}]
        ),
        "json_object": st.sampled_from([True, False, None, {}]),
        "regex": st.sampled_from(["a", "", "a" * 4097, None, 1]),
        "choice": st.sampled_from([["a"], [], [""], "a", None, ["a"] * 257, ["a" * 1025]]),
        "grammar": st.sampled_from(["start: 'a'", "", None]),
        "gramar": st.just("x"),
    },
)
params = st.fixed_dictionaries(
    {},
    optional={
        **{name: around(bound.low, bound.high) for name, bound in BOUNDS.items()},
        "stop": stops,
        "logit_bias": biases,
        "structured_outputs": forms,
        "stop_token_ids": token_ids | st.just([1] * 129) | st.none(),
        "bad_words": stops,
        "ignore_eos": st.sampled_from([True, False, 0, "true", None]),
        "top_q": st.just(1),
    },
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "nobody", None]), "content": st.sampled_from(["", "hello", 1, None])},
    optional={"name": st.just("x")},
)
inputs = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from(["a", "", None, 3, ["a"]]),
        "messages": st.lists(turns, max_size=2) | st.none(),
        "prompt_token_ids": token_ids | st.none(),
        "token_ids": token_ids | st.none(),
    },
)
bodies: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"kind": st.sampled_from(["generate", "predict", "dream", None])},
    optional={
        "model": st.sampled_from(["m", "", "m" * 257, None, 4]),
        "priority": around(PRIORITY.low, PRIORITY.high),
        "input": inputs | st.just([]),
        "params": params | st.none() | st.just([]),
    },
)


def read(body: object) -> Request | HeadraceError:
    try:
        return read_json(JOB_BODY, to_json(body), JOB_NAMES).to_request()
    except HeadraceError as error:
        return error


def read_by_core(body: object) -> Request | HeadraceError:
    try:
        return Request.from_wire(body)
    except HeadraceError as error:
        return error


PREDICT = {"kind": "predict", "input": {"token_ids": [1]}}


@settings(max_examples=600, deadline=None)
@given(bodies)
@example({**PREDICT})
@example({**PREDICT, "params": {}})
@example({**PREDICT, "params": None})
@example({**PREDICT, "params": []})
@example({**PREDICT, "params": {"max_tokens": 1}})
@example({**PLAIN, "params": []})
@example({**PLAIN, "model": None})
@example({"kind": "generate", "input": {"prompt": None, "messages": [{"role": "user", "content": "a"}]}})
def test_the_schema_lets_through_exactly_what_core_reads(body: dict[str, Any]) -> None:
    ours, cores = read(body), read_by_core(body)

    assert isinstance(ours, Request) == isinstance(cores, Request), (ours, cores)
    if isinstance(ours, Request):
        assert ours == cores
    else:
        assert isinstance(ours, RequestError)
        assert ours.param


@pytest.mark.parametrize("name", BOUNDS)
def test_a_parameter_out_of_its_bound_is_refused_in_cores_words(name: str) -> None:
    for value in (BOUNDS[name].low - 1, BOUNDS[name].high + 1):
        error = read({**PLAIN, "params": {name: value}})

        assert isinstance(error, InvalidField)
        assert error.param == f"params.{name}"
        assert str(BOUNDS[name]) in str(error)


@pytest.mark.parametrize("priority", [-101, 101])
def test_a_priority_out_of_its_bound_is_refused_in_cores_words(priority: int) -> None:
    error = read({**PLAIN, "priority": priority})

    assert str(error) == str(read_by_core({**PLAIN, "priority": priority}))
    assert "priority: must be from -100 to 100" in str(error)


@pytest.mark.parametrize(
    ("body", "param", "suggestion"),
    [
        ({**PLAIN, "modle": "m"}, "modle", "model"),
        ({**PLAIN, "params": {"max_token": 3}}, "params.max_token", "max_tokens"),
        ({"kind": "generate", "input": {"promt": "a"}}, "input.promt", "prompt"),
        ({"kind": "generate", "input": {"messages": [{"rol": "user"}]}}, "input.messages.0.rol", "role"),
        ({**PLAIN, "webhook": {"url": "x", "event": []}}, "webhook.event", "events"),
        ({**PLAIN, "prioriti": 1}, "prioriti", "priority"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_known_one(body: object, param: str, suggestion: str | None) -> None:
    errors = [error for error in (read(body),) if isinstance(error, UnknownField)]

    # a missing field may be complained about first; then it is that one's name
    assert [(error.param, error.suggestion) for error in errors] == [(param, suggestion)] or "messages" in param


def test_the_roles_of_a_chat_are_cores() -> None:
    assert get_args(Turn.model_fields["role"].annotation) == ROLES


@pytest.mark.parametrize("hidden", ["prompt", "messages"])
def test_a_complaint_never_repeats_the_prompt(hidden: str) -> None:
    value: object = ["canary-5150"] if hidden == "prompt" else [{"role": "user", "content": ["canary-5150"]}]
    error = read({"kind": "generate", "input": {hidden: value}})

    assert isinstance(error, HeadraceError)
    assert "canary-5150" not in str(error)


def asked_schemas(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema a client's request is checked against, with its place."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", ()):
                yield f"{method} {path} {parameter['name']}", parameter["schema"]
            if "requestBody" in operation:
                yield f"{method} {path} body", operation["requestBody"]["content"]["application/json"]["schema"]


def unbounded(place: str, schema: dict[str, Any], document: dict[str, Any]) -> Iterator[str]:
    """Places under ``schema`` where a client may be as big as it likes."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from unbounded(place, part, document)
    if "enum" in schema or "const" in schema:
        return
    wanted = {
        "string": [{"maxLength"}],
        "array": [{"maxItems"}],
        "integer": [{"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}],
        "number": [{"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}],
        "boolean": [],
        "null": [],
        "object": [],
        None: [{"anyOf", "oneOf"}],
    }[schema.get("type")]
    if "x-max-characters" in schema:
        return  # a client's own JSON schema: its size and depth are bounded by core.structured
    if not all(names & schema.keys() for names in wanted):
        yield place
    if schema.get("type") == "array":
        yield from unbounded(f"{place}[]", schema["items"], document)
    if schema.get("type") == "object":
        yield from _unbounded_object(place, schema, document)


def _unbounded_object(place: str, schema: dict[str, Any], document: dict[str, Any]) -> Iterator[str]:
    for name, part in schema.get("properties", {}).items():
        yield from unbounded(f"{place}.{name}", part, document)
    more = schema.get("additionalProperties", True)
    if more is True or (more is not False and not {"maxProperties", "propertyNames"} <= schema.keys()):
        yield f"{place} (any property)"
    elif more is not False:
        yield from unbounded(f"{place}.*", more, document)


def test_no_field_of_any_request_is_without_a_bound() -> None:
    app = create_app(ApiSettings(), AsyncStore.connect(StoreSettings(redis_url="redis://127.0.0.1:1")))
    document = app.openapi()
    places = list(asked_schemas(document))

    assert len(places) > 15
    assert [found for place, schema in places for found in unbounded(place, schema, document)] == []
