"""Redis away: every route says so within a second, whether the server was killed or hangs, and is back soon after it.

The promises are one second to notice and two to recover; the bounds here are twice that, for machines that are busy.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from fastapi.routing import APIRoute

from api.app import ROUTES
from api.routes import state
from jobs.settings import StoreSettings
from jobs.store import Store
from tests.api_world import GENERATE, front, submit
from tests.conftest import Server, start_valkey
from tests.jobs_world import born
from tests.processes import until

NOTICED_SECONDS = 2.0
BACK_SECONDS = 4.0
BODIES: dict[str, Any] = {
    "/v1/jobs": GENERATE,
    "/v1/jobs/{job_id}": GENERATE,
    "/predict": {"input_text": "Once upon"},
}


@pytest.fixture
def client(own_valkey: Server) -> Iterator[httpx2.Client]:
    """A client of an API whose server may be hurt; a worker seems alive for a minute."""
    store = Store(StoreSettings(redis_url=own_valkey.url, lease_seconds=60))
    born(store)
    store.close()
    with front(own_valkey.url) as one:
        one.put("/v1/jobs/a", json=GENERATE)
        yield one


def every_route() -> list[tuple[str, str]]:
    """All methods and paths that ask the store."""
    routes = [route for each in ROUTES if each is not state for route in each.router.routes]
    found = [(method, each.path) for each in routes if isinstance(each, APIRoute) for method in each.methods or ()]
    return sorted([*found, ("GET", "/ready"), ("GET", "/v1/jobs/{job_id}?wait=10")])


def ask(client: httpx2.Client, method: str, path: str) -> tuple[str, httpx2.Response, float]:
    body = BODIES.get(path) if method in ("POST", "PUT") else None
    start = time.monotonic()
    answer = client.request(method, path.replace("{job_id}", "a"), json=body)
    return f"{method} {path}", answer, time.monotonic() - start


def check_away(client: httpx2.Client) -> None:
    """Every route, all at once, says 503 and when to come back."""
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda route: ask(client, *route), every_route()))
    for route, answer, seconds in answers:
        assert answer.status_code == 503, f"{route}: {answer.status_code} {answer.text}"
        assert 1 <= int(answer.headers["retry-after"]) <= 120, route
        assert seconds < NOTICED_SECONDS, f"{route} took {seconds:.2f} s"
    assert client.get("/ready").json()["reasons"] == ["the job store does not answer"]
    assert client.get("/health").status_code == 200
    assert "headrace_store_up 0.0" in client.get("/metrics").text


def check_back(client: httpx2.Client, since: float) -> None:
    """The first job came, and the last one that was accepted is still there."""
    until(lambda: client.get("/v1/jobs/a").status_code == 200)
    answer = client.put("/v1/jobs/b", json=GENERATE)

    assert answer.status_code == 202, answer.text
    assert time.monotonic() - since < BACK_SECONDS
    assert client.get("/ready").status_code == 200


def test_calls_in_flight_and_calls_to_come_fail_soon_when_the_server_hangs(
    client: httpx2.Client, own_valkey: Server
) -> None:
    assert client.get("/ready").status_code == 200  # and remembered for a second
    own_valkey.process.send_signal(signal.SIGSTOP)
    try:
        in_flight = [("GET", "/v1/jobs/{job_id}"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs/{job_id}/events")]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda route: ask(client, *route), in_flight))
        for route, answer, seconds in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable"), route
            assert seconds < NOTICED_SECONDS, f"{route} took {seconds:.2f} s"
        assert client.get("/ready").status_code == 503
        time.sleep(1)  # what is remembered of workers and models may be so old
        check_away(client)
    finally:
        own_valkey.process.send_signal(signal.SIGCONT)
    check_back(client, time.monotonic())


def test_ready_says_within_a_second_that_the_server_hangs(client: httpx2.Client, own_valkey: Server) -> None:
    assert client.get("/ready").status_code == 200  # and remembered
    own_valkey.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    try:
        until(lambda: client.get("/ready").status_code == 503)
        assert time.monotonic() - start < NOTICED_SECONDS
    finally:
        own_valkey.process.send_signal(signal.SIGCONT)


def test_a_killed_server_is_noticed_and_its_successor_too(client: httpx2.Client, own_valkey: Server) -> None:
    own_valkey.process.kill()
    own_valkey.process.wait(10)
    start = time.monotonic()
    until(lambda: client.get("/ready").status_code == 503)
    assert time.monotonic() - start < NOTICED_SECONDS
    time.sleep(1)
    check_away(client)
    again = start_valkey(own_valkey.folder)
    try:
        check_back(client, time.monotonic())
    finally:
        again.process.kill()
        again.process.wait(10)


def test_a_wait_that_was_held_ends_when_the_server_hangs(client: httpx2.Client, own_valkey: Server) -> None:
    job = submit(client)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.get, f"/v1/jobs/{job['id']}?wait=20")
        time.sleep(0.3)
        own_valkey.process.send_signal(signal.SIGSTOP)
        try:
            answer = held.result(5)  # it looks at a silent job once a second
        finally:
            own_valkey.process.send_signal(signal.SIGCONT)

    assert answer.status_code == 503
