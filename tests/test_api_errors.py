"""Errors: one table, one shape, nothing leaked."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, cast

import anyio
import httpx2
import pytest

from api import errors as ours
from api.app import ANSWERS, answer_to, create_app
from api.settings import ApiSettings
from core import errors
from core.errors import HeadraceError, QueueFull
from jobs.async_store import AsyncStore
from tests.api_world import GENERATE, finish, submit

pytest_plugins = ("tests.api_world",)


def tree(root: type[HeadraceError]) -> Iterator[type[HeadraceError]]:
    """``root`` and all below it that live in our rooms."""
    yield root
    for cls in root.__subclasses__():
        yield from tree(cls)


EVERY = [cls for cls in tree(HeadraceError) if cls.__module__ in (errors.__name__, ours.__name__)]


@pytest.mark.parametrize("cls", EVERY)
def test_every_error_has_an_answer_that_clients_can_obey(cls: type[HeadraceError]) -> None:
    row = next(ANSWERS[base] for base in cls.__mro__ if base in ANSWERS)

    assert 400 <= HTTPStatus(row.status) <= 599
    assert row.retry_after is None or 1 <= row.retry_after <= 120  # above 120 s clients give up
    if row.status == 409:
        assert row.repeat is False  # clients repeat a 409 unless told not to
    if row.status == 503:
        assert row.retry_after is not None


@pytest.mark.parametrize(("estimate", "sent"), [(0, 1), (7, 7), (4_000, 120)])
def test_a_full_queue_says_honestly_when_to_come_back(estimate: int, sent: int) -> None:
    row = answer_to(QueueFull(10, 10, estimate))

    assert (row.status, row.retry_after) == (429, sent)


def test_an_error_is_a_problem_and_openais_error_at_once(lonely: httpx2.Client) -> None:
    answer = lonely.post("/v1/jobs", json={**GENERATE, "params": {"top_p": 7}}, headers={"x-request-id": "mine-1"})

    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json() == {
        "type": "urn:headrace:error:invalid_field",
        "title": HTTPStatus(422).phrase,
        "status": 422,
        "detail": "params.top_p: must be above 0.0 and at most 1.0, not 7",
        "instance": "/v1/jobs",
        "request_id": "mine-1",
        "error": {
            "message": "params.top_p: must be above 0.0 and at most 1.0, not 7",
            "type": "invalid_request_error",
            "param": "params.top_p",
            "code": "invalid_field",
        },
    }


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", 'quo"te', "a\tb"])
def test_a_request_id_that_is_not_sane_is_replaced(lonely: httpx2.Client, sent: str) -> None:
    given = lonely.get("/health", headers={"x-request-id": sent}).headers["x-request-id"]

    assert given.startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", "/v1/jobs", b"{", 400, "malformed_json"),
        ("POST", "/v1/jobs", b"", 400, "malformed_json"),
        ("POST", "/v1/jobs", b"\xff\xfe", 400, "malformed_json"),
        ("POST", "/v1/jobs", b'{"kind": "generate", "input": {"prompt": "\\ud800"}}', 400, "malformed_json"),
        ("POST", "/v1/jobs", b"[" * 1_000_000, 400, "malformed_json"),
        ("POST", "/v1/jobs", b'{"a":' * 200_000, 400, "malformed_json"),
        ("POST", "/v1/jobs", b"[]", 422, "invalid_field"),
        ("POST", "/v1/jobs", b"null", 422, "invalid_field"),
        ("GET", "/v1/nothing", b"", 404, "route_not_found"),
        ("PATCH", "/v1/jobs/a", b"", 405, "method_not_allowed"),
        ("POST", "/v1/jobs/a", b"", 405, "method_not_allowed"),
    ],
)
def test_whatever_is_sent_the_answer_has_the_one_shape(
    lonely: httpx2.Client, method: str, path: str, content: bytes, status: int, code: str
) -> None:
    answer = lonely.request(method, path, content=content)
    body = answer.json()

    assert answer.status_code == body["status"] == status
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["request_id"] == answer.headers["x-request-id"]


def test_a_405_lists_every_method_of_the_path(lonely: httpx2.Client) -> None:
    assert lonely.patch("/v1/jobs/a").headers["allow"] == "DELETE, GET, PUT"


class BrokenStore:
    """A store with a bug whose text nobody outside may read."""

    error: Exception = RuntimeError("canary-in-a-traceback")

    async def get(self, job_id: str) -> None:
        raise self.error


def look(store: BrokenStore) -> httpx2.Response:
    async def get() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=create_app(ApiSettings(), cast("AsyncStore", store)))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/v1/jobs/a")

    return anyio.run(get)


def test_our_own_mistake_is_500_with_a_fixed_text_and_the_details_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    answer = look(BrokenStore())

    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "canary" not in answer.text
    assert "canary-in-a-traceback" in caplog.text
    assert answer.headers["x-request-id"] in caplog.text


def test_a_lost_store_is_503_without_its_address() -> None:
    store = BrokenStore()
    store.error = errors.StoreUnavailable("unix:///secret/canary.sock refused")
    answer = look(store)

    assert answer.status_code == 503
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert "canary" not in answer.text


def test_logs_hold_ids_and_lengths_and_never_prompts(api: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    canary = "canary-8472"
    job = finish(api, input={"prompt": canary}, metadata={"note": canary})
    finish(api, input={"messages": [{"role": "user", "content": canary}]})
    api.post("/predict", json={"input_text": canary})
    api.post("/v1/jobs", json={**GENERATE, "params": {"stop": [canary, 1]}})
    api.post("/v1/jobs", content=json.dumps({"kind": canary, "input": canary}) + "}")
    api.get(f"/v1/jobs?status={canary}")

    assert job["id"] in caplog.text
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]  # the client's own
    assert canary not in "".join(ours)


def test_no_path_forges_a_line_of_the_log(lonely: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lonely.get("/v1/jobs/a%0Aforged")

    assert not any("\n" in record.getMessage() for record in caplog.records if record.name == "headrace.api")


def test_the_openapi_document_describes_bodies_and_errors(lonely: httpx2.Client) -> None:
    document: dict[str, Any] = lonely.get("/openapi.json").json()
    operation = document["paths"]["/v1/jobs"]["post"]

    assert {"GenerateBody", "PredictBody", "TextBody", "Problem"} <= document["components"]["schemas"].keys()
    assert operation["responses"]["default"]["content"].keys() == {"application/problem+json"}
    assert "422" not in operation["responses"]


def test_a_job_never_repeats_its_prompt(lonely: httpx2.Client) -> None:
    assert "canary-77" not in json.dumps(submit(lonely, input={"prompt": "canary-77"}))
