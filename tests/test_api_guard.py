"""Who may come in: key, host, origin; and how much they may bring."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any, cast

import anyio
import httpx2
import pytest
from fastapi.routing import APIRoute

from api.app import ROUTES, create_app
from api.guard import OPEN_PATHS
from api.settings import ApiSettings
from jobs.async_store import AsyncStore
from tests.api_world import GENERATE, front

KEY = "sk_test_0123456789"

pytest_plugins = ("tests.api_world",)


@pytest.fixture(scope="module")
def locked(api_redis: str) -> Iterator[httpx2.Client]:
    """A client of an API with a key, which the client does not have."""
    with front(api_redis, api_key=KEY, allow_origin="https://app.example", max_body_bytes=65_536) as client:
        yield client


def every_route() -> list[tuple[str, str]]:
    """All methods and paths, read off the routers and off the app itself."""
    routes = [route for each in ROUTES for route in each.router.routes if isinstance(route, APIRoute)]
    found = {(method, route.path.replace("{job_id}", "a")) for route in routes for method in route.methods or ()}
    app = create_app(ApiSettings(), cast("AsyncStore", _Nothing()))
    for path, operations in app.openapi()["paths"].items():
        found |= {(method.upper(), path.replace("{job_id}", "a")) for method in operations}
    plain = [route for route in app.routes if isinstance(getattr(route, "path", None), str)]
    found |= {("GET", route.path) for route in plain if "{" not in route.path}  # type: ignore[attr-defined]
    return sorted(found)


class _Nothing:
    """A store that is never asked."""

    def __getattr__(self, name: str) -> object:
        return None


@pytest.mark.parametrize(("method", "path"), every_route())
def test_with_a_key_every_route_but_health_and_ready_wants_it(locked: httpx2.Client, method: str, path: str) -> None:
    answer = locked.request(method, path)

    if path in OPEN_PATHS:
        assert answer.status_code in (200, 503)
    else:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_the_routes_are_all_there() -> None:
    assert len(every_route()) >= 15
    assert {"/health", "/ready"} == OPEN_PATHS


@pytest.mark.parametrize(
    "path", ["/health/", "//health", "/health/../v1/jobs", "/HEALTH", "/docs", "/nothing", "/ready%2f"]
)
def test_no_spelling_of_a_path_gets_around_the_key(locked: httpx2.Client, path: str) -> None:
    assert locked.get(path).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}],
)
def test_the_key_opens_as_bearer_or_in_its_own_header(locked: httpx2.Client, headers: dict[str, str]) -> None:
    assert locked.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": "Bearer"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": ""},
    ],
)
def test_anything_else_does_not(locked: httpx2.Client, headers: dict[str, Any]) -> None:
    assert locked.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"])
def test_without_a_key_local_names_are_answered(lonely: httpx2.Client, host: str) -> None:
    assert lonely.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil", "[", ""]
)
def test_without_a_key_a_rebound_name_is_refused(lonely: httpx2.Client, host: str) -> None:
    answer = lonely.get("/health", headers={"host": host})

    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_without_a_key_a_page_elsewhere_changes_nothing(lonely: httpx2.Client, headers: dict[str, str]) -> None:
    answer = lonely.post("/v1/jobs", json=GENERATE, headers={**headers, "content-type": "text/plain"})

    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "origin_not_allowed"


def test_a_page_of_our_own_and_a_program_are_let_in(lonely: httpx2.Client) -> None:
    own = {"origin": f"http://{lonely.base_url.netloc.decode()}", "sec-fetch-site": "same-origin"}

    assert lonely.post("/v1/jobs", json=GENERATE, headers=own).status_code == 202
    assert lonely.post("/v1/jobs", json=GENERATE).status_code == 202


def test_only_the_allowed_origin_may_read_from_a_browser(locked: httpx2.Client) -> None:
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    friend = locked.options("/v1/jobs", headers={"origin": "https://app.example", **wanted})
    stranger = locked.options("/v1/jobs", headers={"origin": "https://evil.example", **wanted})
    refused = locked.get("/v1/jobs", headers={"origin": "https://app.example"})

    assert friend.status_code == 200
    assert friend.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in stranger.headers
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"  # so that the page can read why


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_413_declared_or_not(locked: httpx2.Client, declared: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 4_096

    content: Any = b" " * 81_920 if declared else pieces()
    answer = locked.post("/v1/jobs", content=content, headers={"x-api-key": KEY})

    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "65536" in answer.json()["detail"]


def test_a_body_declared_too_large_is_refused_before_it_is_sent(locked: httpx2.Client) -> None:
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\nContent-Length: 999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", locked.base_url.port or 0), timeout=10) as client:
        client.sendall(head.encode())
        answer = client.recv(4_096)

    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_client_that_still_sends_a_body_that_is_too_large_sees_the_answer(locked: httpx2.Client) -> None:
    """A connection that is closed on unread bytes is reset, and the answer lost."""
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\nContent-Length: 999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", locked.base_url.port or 0), timeout=10) as client:
        client.sendall(head.encode())
        time.sleep(0.2)
        client.sendall(b" " * 500_000)
        time.sleep(0.2)
        client.sendall(b" " * 499_999)
        answer = b"".join(iter(lambda: client.recv(65_536), b""))

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


def test_a_head_without_end_is_cut_off(locked: httpx2.Client) -> None:
    with socket.create_connection(("127.0.0.1", locked.base_url.port or 0), timeout=10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        try:
            while sent < 4_000_000:
                sent += client.send(b"X-Filler: " + b"x" * 8_000 + b"\r\n")
        except OSError:
            pass

    assert sent < 4_000_000


def test_an_honest_body_far_longer_than_a_head_passes(lonely: httpx2.Client) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"kind": "generate", "input": {"prompt": "'
        for _ in range(3_000):
            yield b"x" * 100
        yield b'"}}'

    assert lonely.post("/v1/jobs", content=pieces()).status_code == 202


def test_no_documentation_page_is_served() -> None:
    async def statuses() -> list[int]:
        transport = httpx2.ASGITransport(app=create_app(ApiSettings(), cast("AsyncStore", _Nothing())))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [(await client.get(path)).status_code for path in ("/docs", "/redoc", "/docs/oauth2-redirect")]

    assert anyio.run(statuses) == [404, 404, 404]
