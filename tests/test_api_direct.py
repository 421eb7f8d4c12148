"""The short way of a submission answers as the long one does."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import pytest
from fastapi.routing import APIRoute

from api.direct import Direct
from tests.api_world import GENERATE

pytest_plugins = ["tests.api_world"]

Asked = dict[str, Any]

REQUESTS: dict[str, Asked] = {
    "a job": {"json": GENERATE},
    "to be waited for": {"json": GENERATE, "headers": {"prefer": "wait=0"}},
    "asynchronously": {"json": GENERATE, "headers": {"prefer": "respond-async"}},
    "two preferences": {"json": GENERATE, "headers": [("prefer", "respond-async"), ("prefer", "wait=1")]},
    "a preference without end": {"json": GENERATE, "headers": {"prefer": "x" * 1_025}},
    "with a query": {"json": GENERATE, "params": {"wait": "1"}},
    "another kind": {"json": {"kind": "predict", "input": {"token_ids": [1, 2]}}},
    "no such kind": {"json": {**GENERATE, "kind": "guess"}},
    "no such field": {"json": {**GENERATE, "promt": "x"}},
    "out of bounds": {"json": {**GENERATE, "params": {"top_p": 2}}},
    "no such model": {"json": {**GENERATE, "model": "nobody's"}},
    "late without a deadline": {"json": {**GENERATE, "refuse_if_late": True}},
    "a webhook that is not allowed": {"json": {**GENERATE, "webhook": {"url": "http://localhost/"}}},
    "no JSON": {"content": b"{"},
    "nothing": {"content": b""},
    "too much": {"content": b" " * 9_000_000},
    "another host": {"json": GENERATE, "headers": {"host": "example.org"}},
    "another origin": {"json": GENERATE, "headers": {"origin": "https://example.org"}},
    "a type of its own": {"content": json.dumps(GENERATE), "headers": {"content-type": "text/plain"}},
    "a request id": {"json": GENERATE, "headers": {"x-request-id": "mine"}},
}


def ask(client: httpx2.Client, asked: Asked, method: str = "POST") -> tuple[int, dict[str, str], Any]:
    """Status, headers and body, without what is another's each time."""
    answer = client.request(method, "/v1/jobs", **asked)
    text = re.sub(r"(job|req)_[0-9a-f]{32}", r"\1_", answer.text)
    body = json.loads(re.sub(r'"(created_at|queue_position)":[0-9.]+', r'"\1":0', text))
    headers = {name: re.sub(r"(job|req)_[0-9a-f]{32}", r"\1_", value) for name, value in answer.headers.items()}
    return answer.status_code, {**headers, "date": "", "content-length": ""}, body


@pytest.mark.parametrize("name", REQUESTS)
def test_it_answers_as_the_web_framework_does(
    lonely: httpx2.Client, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    short = ask(lonely, REQUESTS[name])
    monkeypatch.setattr(Direct, "__call__", lambda self, *asgi: self._app(*asgi))
    assert short == ask(lonely, REQUESTS[name])


def test_a_submission_and_nothing_else_takes_it(lonely: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: APIRoute, *asgi: Any) -> None:
        raise RuntimeError("the long way")

    monkeypatch.setattr(APIRoute, "handle", fail)
    assert ask(lonely, REQUESTS["a job"])[0] == 202
    assert [ask(lonely, {}, method)[0] for method in ("GET", "PUT")] == [500, 500]
    assert ask(lonely, REQUESTS["a preference without end"])[0] == 500
    assert lonely.post("/v1/jobs/", json=GENERATE).status_code == 404


def test_it_is_counted_under_its_route(lonely: httpx2.Client) -> None:
    ask(lonely, REQUESTS["a job"])
    ask(lonely, REQUESTS["no such field"])
    counted = [line for line in lonely.get("/metrics").text.splitlines() if line.startswith("headrace_http_requests_t")]
    assert any('method="POST",route="/v1/jobs",status="202"' in line for line in counted)
    assert any('method="POST",route="/v1/jobs",status="422"' in line for line in counted)
