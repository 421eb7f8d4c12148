"""Golden examples: what clients have stored must be read, and what they read must be written, for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from api.app import answer_to
from api.complaints import read_json
from api.problems import Asked, problem
from api.schema import JOB_BODY, JOB_NAMES
from api.sse import frame
from core.errors import PromptTooLong
from core.request import FIELDS, Kind, Request
from jobs.job import Job, JobState

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def succeeded() -> Job:
    """The job of ``job.json``."""
    return Job(
        id="job_0123456789abcdef",
        kind=Kind.GENERATE,
        model="smollm2-135m",
        state=JobState.SUCCEEDED,
        created_at=1790000000.123,
        started_at=1790000000.13,
        first_token_at=1790000000.211,
        finished_at=1790000001.002,
        expires_at=1790086401.0,
        attempt=1,
        worker="host-1-a",
        tokens_generated=2,
        result=golden("job.json")["result"],
        metadata={"any": "string"},
    )


def test_a_job_is_written_as_it_always_was() -> None:
    wire = json.loads(json.dumps(succeeded().to_wire()))

    assert golden("job.json").items() <= wire.items()  # names may be added, never changed or taken away


def test_events_are_written_as_they_always_were() -> None:
    [started, token] = golden("events.json")
    written = frame(0, "started", started) + frame(1, "token", token)
    written += frame(2, "finished", {"job": golden("job.json")})

    assert written == (GOLDEN / "events.txt").read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "request_prompt.json",
        "request_messages.json",
        "request_ids.json",
        "request_predict.json",
        "request_choices.json",
        "request_sampling.json",
        "request_priority.json",
    ],
)
def test_a_request_is_read_as_it_always_was(name: str) -> None:
    example = golden(name)
    request = read_json(JOB_BODY, json.dumps(example).encode(), JOB_NAMES).to_request()
    stored = {key: value for key, value in example.items() if key in FIELDS}

    assert request == Request.from_wire(stored)
    assert Request.from_wire(request.to_wire()) == request


def test_an_error_is_written_as_it_always_was() -> None:
    error = PromptTooLong(9_000, 8_191)
    asked = Asked(request_id="req_0", path="/v1/jobs")

    assert problem(error, answer_to(error), asked).items() >= golden("problem.json").items()
