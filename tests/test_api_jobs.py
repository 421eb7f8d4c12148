"""Jobs over HTTP, from acceptance to oblivion, on a real Valkey and a real worker process."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx2
import pytest

from tests.api_world import GENERATE, finish, fresh_id, submit

pytest_plugins = ("tests.api_world",)


def test_a_submitted_job_is_answered_202_with_where_and_when_to_look(api: httpx2.Client) -> None:
    answer = api.post("/v1/jobs", json=GENERATE)
    job = answer.json()

    assert answer.status_code == 202
    assert answer.headers["location"] == job["urls"]["self"] == f"/v1/jobs/{job['id']}"
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert job["status"] in ("queued", "running", "succeeded")
    assert job["model"] == "instant"


def test_a_job_waited_for_comes_with_its_result(api: httpx2.Client) -> None:
    job = finish(api, metadata={"who": "me"})
    [choice] = job["result"]["choices"]

    assert job["status"] == "succeeded"
    assert len(choice["token_ids"]) == 8
    assert job["metadata"] == {"who": "me"}
    assert job["worker"]
    assert job["error"] is None


def test_a_job_is_answered_with_its_priority_wherever_it_is_shown(lonely: httpx2.Client) -> None:
    job_id = fresh_id()
    answers = [lonely.put(f"/v1/jobs/{job_id}", json={**GENERATE, "priority": -3}), lonely.get(f"/v1/jobs/{job_id}")]
    plain = lonely.post("/v1/jobs", json=GENERATE).json()

    assert [answer.json()["priority"] for answer in answers] == [-3, -3]
    assert plain["priority"] == 0
    shown = {job["id"]: job["priority"] for job in lonely.get("/v1/jobs").json()["data"]}
    assert (shown[job_id], shown[plain["id"]]) == (-3, 0)
    assert lonely.put(f"/v1/jobs/{job_id}", json={**GENERATE, "priority": 3}).json()["error"]["code"] == "id_reused"


def test_a_priority_out_of_its_bound_is_422_with_field_and_bound(lonely: httpx2.Client) -> None:
    for path, body in (("/v1/jobs", GENERATE), ("/predict", {"input_text": "a"})):
        answer = lonely.post(path, json={**body, "priority": 101})

        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "priority")
        assert "from -100 to 100" in answer.json()["detail"]


def test_prefer_wait_answers_200_with_the_result(api: httpx2.Client) -> None:
    answer = api.post("/v1/jobs", json=GENERATE, headers={"prefer": "wait=20"})

    assert answer.status_code == 200
    assert answer.json()["status"] == "succeeded"
    assert answer.headers["preference-applied"] == "wait=20"
    assert answer.headers["vary"] == "Prefer"
    assert answer.headers["location"]


def test_prefer_wait_answers_202_when_the_time_is_over(lonely: httpx2.Client) -> None:
    start = time.monotonic()
    answer = lonely.post("/v1/jobs", json=GENERATE, headers={"prefer": "wait=1"})

    assert answer.status_code == 202
    assert answer.json()["status"] == "queued"
    assert 0.9 <= time.monotonic() - start < 5


def test_respond_async_is_said_to_be_applied(lonely: httpx2.Client) -> None:
    answer = lonely.post("/v1/jobs", json=GENERATE, headers={"prefer": "respond-async"})

    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "respond-async"


def test_the_same_body_under_the_same_id_is_one_job(api: httpx2.Client) -> None:
    job_id = fresh_id()
    first = api.put(f"/v1/jobs/{job_id}", json=GENERATE)
    second = api.put(f"/v1/jobs/{job_id}", json={**GENERATE, "model": "INSTANT"})

    assert first.status_code == 202
    assert second.status_code == 200
    assert second.json()["id"] == first.json()["id"] == job_id
    assert second.json()["created_at"] == first.json()["created_at"]


def test_another_body_under_a_known_id_is_refused_for_good(api: httpx2.Client) -> None:
    job_id = fresh_id()
    api.put(f"/v1/jobs/{job_id}", json=GENERATE)
    answer = api.put(f"/v1/jobs/{job_id}", json={**GENERATE, "params": {"max_tokens": 9}})

    assert answer.status_code == 422
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "id_reused"


def test_many_at_once_under_one_id_make_one_job(api: httpx2.Client) -> None:
    job_id, answers = fresh_id(), list[httpx2.Response]()
    threads = [
        threading.Thread(target=lambda: answers.append(api.put(f"/v1/jobs/{job_id}", json=GENERATE))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(answer.status_code for answer in answers) == [200] * 11 + [202]
    assert len({answer.json()["created_at"] for answer in answers}) == 1


@pytest.mark.parametrize("job_id", ["a.b", "a b", "é", "x" * 129])
def test_an_id_outside_the_alphabet_is_refused(lonely: httpx2.Client, job_id: str) -> None:
    answer = lonely.put(f"/v1/jobs/{job_id}", json=GENERATE)

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "job_id"


def test_a_wait_beyond_the_bound_is_refused_with_the_bound(lonely: httpx2.Client) -> None:
    job = submit(lonely)
    answer = lonely.get(f"/v1/jobs/{job['id']}?wait=61")

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "wait"
    assert "60" in answer.json()["detail"]


def test_a_queued_job_has_a_position_and_an_unknown_eta(lonely: httpx2.Client) -> None:
    job = submit(lonely)
    found = lonely.get(f"/v1/jobs/{job['id']}").json()

    assert found["queue_position"] >= 0
    assert found["eta_seconds"] is None


def test_a_queued_job_is_cancelled_at_once_and_only_once(lonely: httpx2.Client) -> None:
    job = submit(lonely)
    first = lonely.post(job["urls"]["cancel"])
    second = lonely.post(job["urls"]["cancel"])

    assert first.status_code == 200
    assert first.json()["status"] == "cancelled"
    assert second.status_code == 409
    assert second.headers["x-should-retry"] == "false"


def test_a_running_job_is_cancelled_with_what_it_has(api: httpx2.Client) -> None:
    job = submit(api, params={"max_tokens": 20_000})
    with api.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
        next(line for line in stream.iter_lines() if line == "event: token")
    answer = api.post(job["urls"]["cancel"])
    ended = api.get(f"/v1/jobs/{job['id']}?wait=20").json()

    assert answer.status_code == 200
    assert ended["status"] == "cancelled"
    assert ended["result"]["choices"][0]["finish_reason"] == "cancelled"
    assert 0 < len(ended["result"]["choices"][0]["token_ids"]) < 20_000


def test_an_unfinished_job_cannot_be_forgotten_and_an_ended_one_can(lonely: httpx2.Client) -> None:
    job = submit(lonely)
    early = lonely.delete(f"/v1/jobs/{job['id']}")
    lonely.post(job["urls"]["cancel"])
    late = lonely.delete(f"/v1/jobs/{job['id']}")

    assert early.status_code == 409
    assert early.headers["x-should-retry"] == "false"
    assert late.status_code == 204
    assert lonely.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_only_a_failed_job_is_retried(api: httpx2.Client) -> None:
    failed = finish(api, input={"prompt": "!fail"})
    again = api.post(f"/v1/jobs/{failed['id']}/retry")
    succeeded = finish(api)
    refused = api.post(f"/v1/jobs/{succeeded['id']}/retry")

    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "engine_error"
    assert again.status_code == 200
    assert again.json()["status"] in ("queued", "running", "failed")
    assert refused.status_code == 409


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/retry"), ("DELETE", "")],
)
def test_an_unknown_job_is_404_on_every_route(lonely: httpx2.Client, method: str, path: str) -> None:
    answer = lonely.request(method, f"/v1/jobs/unknown{path}")

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "job_not_found"


def pages(client: httpx2.Client, query: str) -> list[dict[str, Any]]:
    """Every job that ``query`` finds, page by page."""
    found, after = [], ""
    while True:
        page = client.get(f"/v1/jobs?{query}{after}").json()
        found += page["data"]
        if not page["has_more"]:
            return found
        assert page["last_id"] == page["data"][-1]["id"]
        after = f"&after={page['last_id']}"


def test_pages_hold_every_job_once_newest_first(lonely: httpx2.Client) -> None:
    ids = [submit(lonely)["id"] for _ in range(7)]
    listed = [job["id"] for job in pages(lonely, "limit=3&status=queued") if job["id"] in ids]

    assert listed == ids[::-1]


def test_a_list_holds_only_the_states_and_kinds_asked_for(lonely: httpx2.Client) -> None:
    job = submit(lonely)
    lonely.post(job["urls"]["cancel"])
    cancelled = lonely.get("/v1/jobs?status=cancelled&status=failed").json()
    predicted = lonely.get("/v1/jobs?kind=predict").json()

    assert {found["status"] for found in cancelled["data"]} == {"cancelled"}
    assert cancelled["first_id"] == cancelled["data"][0]["id"]
    assert predicted == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_a_page_behind_an_unknown_job_is_404(lonely: httpx2.Client) -> None:
    assert lonely.get("/v1/jobs?after=unknown").status_code == 404


def test_a_list_can_be_narrowed_to_a_reason(lonely: httpx2.Client) -> None:
    assert lonely.get("/v1/jobs?status=failed&reason=poison_job").json()["data"] == []


@pytest.mark.parametrize(
    ("query", "param"), [("limit=101", "limit"), ("limit=0", "limit"), ("stauts=queued", "stauts")]
)
def test_a_bad_query_is_refused_by_name(lonely: httpx2.Client, query: str, param: str) -> None:
    answer = lonely.get(f"/v1/jobs?{query}")

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param


def test_a_model_no_worker_serves_is_404_naming_those_served(api: httpx2.Client) -> None:
    answer = api.post("/v1/jobs", json={**GENERATE, "model": "gpt-99"})

    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "model 'gpt-99': no worker serves it; served now: instant",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_without_a_worker_the_servers_own_model_is_accepted_and_no_other(lonely: httpx2.Client) -> None:
    assert lonely.post("/v1/jobs", json={**GENERATE, "model": "smollm2-135m"}).status_code == 202
    assert lonely.post("/v1/jobs", json={**GENERATE, "model": "gpt-99"}).status_code == 404
    assert submit(lonely)["model"] is None
