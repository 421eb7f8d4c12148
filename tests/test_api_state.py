"""Health, readiness, numbers, and who is there."""

from __future__ import annotations

import anyio
import httpx2
from prometheus_client.parser import text_string_to_metric_families

from jobs.remembered import Remembered
from tests.api_world import finish, front, submit
from tests.conftest import Server

pytest_plugins = ("tests.api_world",)


def test_health_says_that_the_process_lives(lonely: httpx2.Client) -> None:
    assert lonely.get("/health").json() == {"status": "ok"}


def test_ready_with_a_worker_and_a_safe_redis(api: httpx2.Client) -> None:
    answer = api.get("/ready")

    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "durability": "fsync", "reasons": []}


def test_not_ready_without_a_worker_and_says_so(lonely: httpx2.Client) -> None:
    answer = lonely.get("/ready")

    assert answer.status_code == 503
    assert answer.json()["reasons"] == ["no worker is alive"]
    assert 1 <= int(answer.headers["retry-after"]) <= 120


def test_durability_memory_is_said_where_operators_look(valkey_url: str) -> None:
    with front(valkey_url, durability="memory") as client:
        body = client.get("/ready").json()

    assert body["durability"] == "memory"
    assert "may lose" in body["warning"]


def test_a_dead_redis_makes_the_server_unready_and_not_dead(own_valkey: Server) -> None:
    with front(own_valkey.url) as client:
        own_valkey.process.kill()
        own_valkey.process.wait(10)
        ready, health = client.get("/ready"), client.get("/health")
        job, metrics = client.get("/v1/jobs/a"), client.get("/metrics")

    assert health.status_code == 200
    assert ready.status_code == 503
    assert ready.json()["reasons"] == ["the job store does not answer"]
    assert (job.status_code, job.json()["error"]["code"]) == (503, "store_unavailable")
    assert "headrace_store_up 0.0" in metrics.text


def test_models_are_those_of_live_workers(api: httpx2.Client, lonely: httpx2.Client) -> None:
    [model] = api.get("/v1/models").json()["data"]

    assert (model["id"], model["object"], model["engine"]) == ("instant", "model", "instant")
    assert lonely.get("/v1/models").json() == {"object": "list", "data": []}


def test_workers_have_a_name_a_place_and_a_state(api: httpx2.Client) -> None:
    [worker] = api.get("/v1/workers").json()["data"]

    assert worker["name"]
    assert worker["host"]
    assert worker["pid"] > 0
    assert worker["model"] == "instant"
    assert worker["state"] in ("idle", "busy")
    assert worker["running"] >= 0
    assert worker["stats"].keys() >= {"steps", "generated_tokens", "decode_rows"}


def samples(client: httpx2.Client) -> dict[str, float]:
    """Metric and labels -> value."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        f"{each.name}{sorted(each.labels.items())}": each.value
        for family in families
        for each in family.samples
        if not each.name.endswith("_created")
    }


def test_metrics_count_requests_by_route_and_never_by_path(api: httpx2.Client) -> None:
    job = finish(api)
    api.get("/v1/" + "x" * 50)
    found = samples(api)

    submitted = "headrace_http_requests_total[('method', 'POST'), ('route', '/v1/jobs'), ('status', '202')]"
    assert found[submitted] >= 1
    assert not any(job["id"] in name or "xxx" in name for name in found)


def test_metrics_show_jobs_queue_and_steps(api: httpx2.Client, lonely: httpx2.Client) -> None:
    submit(lonely)
    queued, worked = samples(lonely), samples(api)

    assert queued["headrace_jobs[('state', 'queued')]"] >= 0
    assert queued.keys() >= {"headrace_queue_depth[]", "headrace_store_up[]"}
    assert worked.keys() >= {
        "headrace_steps_total[]",
        "headrace_tokens_generated_total[]",
        "headrace_decode_rows_count[]",
        "headrace_decode_rows_bucket[('le', '+Inf')]",
    }


def test_what_is_remembered_is_loaded_once_a_second() -> None:
    now, loads = [0.0], list[float]()

    async def load() -> int:
        loads.append(now[0])
        return len(loads)

    remembered = Remembered(load, 1.0, lambda: now[0])

    async def ask() -> list[int]:
        seen = [await remembered.get(), await remembered.get()]
        now[0] = 1.0
        return [*seen, await remembered.get()]

    assert anyio.run(ask) == [1, 1, 2]
