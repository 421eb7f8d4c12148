"""``POST /predict``: one text in, one text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import anyio
import httpx2
import pytest

from api.app import create_app
from api.routes.predict import PARAMS
from api.settings import ApiSettings
from core.card import ModelCard
from core.errors import PromptTooLong
from core.request import Kind, Request
from jobs.async_store import AsyncStore
from jobs.job import Job, JobState, NewJob
from jobs.reports import Submitted
from tests.api_world import front

pytest_plugins = ("tests.api_world",)

IDS_ONLY = ModelCard(
    name="ids",
    engine="instant",
    version="0",
    dtype="none",
    weights="0" * 64,
    kinds=("predict",),
    text=False,
    chat=False,
    max_model_len=8,
    vocab_size=100,
)


def test_a_text_is_continued_by_64_tokens_of_the_raw_text(api: httpx2.Client) -> None:
    answer = api.post("/predict", json={"input_text": "Once upon"})
    job = api.get(answer.headers["content-location"]).json()
    same = api.post(
        "/v1/jobs",
        json={"kind": "generate", "input": {"prompt": "Once upon"}, "params": {"max_tokens": 64}},
        headers={"prefer": "wait=20"},
    ).json()

    assert answer.status_code == 200
    assert answer.json() == {"output_text": job["result"]["choices"][0]["text"]}
    assert job["result"]["choices"] == same["result"]["choices"]
    assert len(job["result"]["choices"][0]["token_ids"]) == 64


def test_a_text_may_say_how_urgent_it_is(api: httpx2.Client) -> None:
    answer = api.post("/predict", json={"input_text": "Once upon", "priority": -9})

    assert api.get(answer.headers["content-location"]).json()["priority"] == -9


def test_the_continuation_is_greedy() -> None:
    assert (PARAMS.max_tokens, PARAMS.temperature) == (64, 0.0)


def test_an_answer_that_takes_too_long_is_504_with_the_jobs_location(api_redis: str, api: httpx2.Client) -> None:
    with front(api_redis, predict_wait_seconds=0.01) as client:
        answer = client.post("/predict", json={"input_text": "slow"})
    job = api.get(f"{answer.headers['location']}?wait=20").json()

    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"  # a repeat would make a second job
    assert job["status"] == "succeeded"


def test_a_failed_job_is_answered_with_its_own_error(api: httpx2.Client) -> None:
    answer = api.post("/predict", json={"input_text": "!fail"})

    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_error"
    assert api.get(answer.headers["location"]).json()["status"] == "failed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input_text"),
        ({"input_text": ""}, "input_text"),
        ({"input_text": "x" * 1_000_001}, "input_text"),
        ({"input_text": ["a"]}, "input_text"),
        ({"input_txt": "a", "input_text": "a"}, "input_txt"),
    ],
)
def test_a_bad_body_is_422_and_names_the_field(api: httpx2.Client, body: dict[str, Any], param: str) -> None:
    answer = api.post("/predict", json=body)

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param


def test_with_nobody_who_knows_the_model_it_is_503(lonely: httpx2.Client) -> None:
    answer = lonely.post("/predict", json={"input_text": "a"})

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_worker"
    assert answer.headers["retry-after"]


@dataclasses.dataclass
class IdsStore:
    """A store whose only model takes token ids; each job ends at once, as the test says."""

    ending: dict[str, Any]
    submitted: list[Request] = dataclasses.field(default_factory=list)
    job: Job | None = None

    async def workers(self) -> Sequence[object]:
        return []

    async def known(self) -> Sequence[ModelCard]:
        return [IDS_ONLY]

    async def submit(self, new: NewJob) -> Submitted:
        self.submitted.append(new.request)
        self.job = Job(id=new.id, kind=new.request.kind, created_at=0.0, **self.ending)
        return Submitted(job=self.job, created=True)

    async def wait(self, job_id: str, seconds: float, *, seen: Job | None = None) -> Job | None:
        return self.job


def ask(store: IdsStore, text: str) -> httpx2.Response:
    """``POST /predict`` to an app in front of ``store``."""

    async def post() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=create_app(ApiSettings(), cast("AsyncStore", store)))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/predict", json={"input_text": text})

    return anyio.run(post)


def test_a_model_without_a_tokenizer_takes_and_gives_ids() -> None:
    store = IdsStore({"state": JobState.SUCCEEDED, "result": {"token_ids": [7, 93, 4], "usage": {}}})
    answer = ask(store, " 12 7\n93 ")

    assert answer.json() == {"output_text": "7 93 4"}
    assert [(each.kind, each.token_ids) for each in store.submitted] == [(Kind.PREDICT, (12, 7, 93))]


@pytest.mark.parametrize("text", [" ", "Once upon", "1 -2", "1.0", "100", "99999999999999999999999999", "²", "1,2"])
def test_no_ids_or_ids_outside_the_vocabulary_are_422_naming_input_text(text: str) -> None:
    store = IdsStore({"state": JobState.QUEUED})
    answer = ask(store, text)

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "input_text"
    assert "token ids" in answer.json()["detail"]
    assert store.submitted == []


def test_an_error_the_worker_found_names_the_field_the_client_wrote() -> None:
    error = PromptTooLong(9, 8, "input.token_ids").to_wire()
    answer = ask(IdsStore({"state": JobState.FAILED, "error": error}), "1 2 3")

    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "prompt_too_long"
    assert answer.json()["error"]["param"] == "input_text"


@pytest.mark.parametrize(("state", "status"), [(JobState.CANCELLED, 409), (JobState.EXPIRED, 504)])
def test_a_job_that_others_ended_is_no_answer(state: JobState, status: int) -> None:
    answer = ask(IdsStore({"state": state}), "1")

    assert answer.status_code == status
    assert answer.headers["location"].startswith("/v1/jobs/job_")
