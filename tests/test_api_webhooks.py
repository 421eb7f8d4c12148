"""Webhooks over HTTP: off until the operator lists hosts, shown on the job, sent again when asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from jobs import keys
from jobs.outbox import Callback, collect, note
from jobs.runner import Runner
from jobs.store import Store
from tests.api_world import GENERATE, fresh_id, front, submit
from tests.conftest import Server
from tests.jobs_world import add, settings

HOSTS = {"webhook_hosts": "hooks.example", "webhook_private_hosts": "http://127.0.0.1:9000"}
URL = "https://hooks.example/a?b=c"


@pytest.fixture(scope="module")
def api(valkey_server: Server) -> Iterator[httpx2.Client]:
    """Of an API without a worker that may call two hosts."""
    with front(valkey_server.url, **HOSTS) as client:
        yield client


@pytest.fixture
def client(api: httpx2.Client, valkey: redis.Redis) -> httpx2.Client:
    """The same, with an empty queue."""
    return api


def ended(client: httpx2.Client) -> dict[str, Any]:
    job = submit(client, webhook={"url": URL})
    found: dict[str, Any] = client.post(job["urls"]["cancel"]).json()
    return found


def collected(valkey: redis.Redis) -> Callback:
    [callback] = Runner(valkey, 60).run(collect(60, 10))
    return callback


def test_a_job_shows_who_is_told_and_how_far_that_has_got(client: httpx2.Client, valkey: redis.Redis) -> None:
    job = submit(client, webhook={"url": URL, "events": ["completed"]})
    fixed = {"url": URL, "events": ["completed"]}
    assert job["webhook"] == {**fixed, "id": None, "state": None, "attempts": 0, "last_error": None}
    over = client.post(job["urls"]["cancel"]).json()["webhook"]
    callback = collected(valkey)
    Runner(valkey, 60).run(note(callback, "failed", "no"))
    given_up = client.get(job["urls"]["self"]).json()["webhook"]

    assert over == {**fixed, "id": callback.id, "state": "pending", "attempts": 0, "last_error": None}
    assert given_up == {**fixed, "id": callback.id, "state": "failed", "attempts": 1, "last_error": "no"}
    assert (callback.job_id, callback.url, callback.type) == (job["id"], URL, "job.cancelled")
    assert submit(client)["webhook"] is None


def test_a_predict_job_may_name_a_webhook_too(client: httpx2.Client) -> None:
    body = {"kind": "predict", "input": {"token_ids": [1]}, "webhook": {"url": "http://127.0.0.1:9000/"}}
    answer = client.put(f"/v1/jobs/{fresh_id()}", json=body)

    assert answer.json()["webhook"]["url"] == "http://127.0.0.1:9000/"


def test_it_is_sent_again_when_somebody_asks(client: httpx2.Client, valkey: redis.Redis) -> None:
    job = ended(client)
    callback = collected(valkey)
    Runner(valkey, 60).run(note(callback, "delivered"))
    answer = client.post(f"/v1/jobs/{job['id']}/webhook/resend")
    again = collected(valkey)

    assert (answer.status_code, answer.json()["webhook"]["state"]) == (200, "pending")
    assert (again.id, again.attempt, again.tries) == (callback.id, 2, 1)


def test_what_was_never_told_cannot_be_told_again(client: httpx2.Client) -> None:
    running = submit(client, webhook={"url": URL})["id"]
    silent = submit(client)["id"]
    answers = [client.post(f"/v1/jobs/{job_id}/webhook/resend") for job_id in (running, silent, "nobody")]

    assert [answer.status_code for answer in answers] == [409, 409, 404]
    assert answers[0].headers["x-should-retry"] == "false"


def refusal(client: httpx2.Client, webhook: Any) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json={**GENERATE, "webhook": webhook})
    assert answer.status_code == 422, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


def test_webhooks_are_refused_by_the_setting_s_name_until_hosts_are_listed(
    valkey_url: str, valkey: redis.Redis
) -> None:
    with front(valkey_url) as client:
        error = refusal(client, {"url": URL})

    assert (error["code"], error["param"]) == ("invalid_field", "webhook.url")
    assert "webhook_hosts" in error["message"]
    assert "off" in error["message"]
    assert not valkey.exists(keys.READY)


@pytest.mark.parametrize(
    "url",
    ["https://other.example/", "http://hooks.example/", "https://u:p@hooks.example/", "https://127.0.0.1:9000/", "x"],
)
def test_every_address_that_is_not_listed_is_refused_with_one_text(client: httpx2.Client, url: str) -> None:
    error = refusal(client, {"url": url})

    assert error == refusal(client, {"url": "https://10.0.0.1/"})
    assert url not in error["message"]


@pytest.mark.parametrize(
    ("webhook", "param"),
    [
        ({}, "webhook.url"),
        ({"url": ""}, "webhook.url"),
        ({"url": "https://hooks.example/" + "x" * 2_048}, "webhook.url"),
        ({"url": URL, "events": []}, "webhook.events"),
        ({"url": URL, "events": ["started"]}, "webhook.events.0"),
        ({"url": URL, "events": ["completed"] * 2}, "webhook.events"),
        ({"url": URL, "secret": "x"}, "webhook.secret"),
        (URL, "webhook"),
    ],
)
def test_a_webhook_that_cannot_be_is_refused_by_its_field(client: httpx2.Client, webhook: Any, param: str) -> None:
    assert refusal(client, webhook)["param"] == param


def test_the_metrics_count_callbacks(valkey_url: str, valkey: redis.Redis) -> None:
    store = Store(settings(valkey_url, durability="memory"))
    for state in ("delivered", "failed", "failed", ""):
        store.cancel(add(store, webhook=URL).id)
        if state:
            Runner(valkey, 60).run(note(collected(valkey), state))
    store.close()
    with front(valkey_url) as client:
        text = client.get("/metrics").text

    assert "headrace_webhooks_pending 1.0" in text
    assert "headrace_webhooks_delivered_total 1.0" in text
    assert "headrace_webhooks_failed_total 2.0" in text


def test_a_list_that_cannot_be_read_stops_the_api(valkey_url: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    from tests.worker_world import environment

    environ = environment(valkey_url, webhook_hosts="https://hooks.example/path")
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "api"], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert ended.returncode == 2
    assert "HEADRACE_WEBHOOK_HOSTS: must list host" in ended.stderr
