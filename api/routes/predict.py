"""``POST /predict``: one text in, one text out, through the same queue as every job."""

from __future__ import annotations

import dataclasses
import secrets

from fastapi import APIRouter
from starlette.responses import Response

from api.answers import json_answer
from api.bodies import AText, described
from api.context import Here
from api.errors import JobNotSucceeded, StillRunning, TooManyStreams
from api.schema import TextBody
from core.bounds import MAX_PROMPT_TOKENS, Wire
from core.card import ModelCard
from core.errors import InvalidField
from core.request import Kind, Request, SamplingParams
from jobs.job import FINAL, Job, JobState, NewJob

router = APIRouter(tags=["predict"])

PARAMS = SamplingParams(max_tokens=64, temperature=0.0)


@router.post("/predict", openapi_extra=described(TextBody))
async def predict(here: Here, body: AText) -> Response:
    """Continue a text greedily by 64 tokens; without a tokenizer, the likeliest next id at each position."""
    asked = _request(body.input_text, await here.fleet.card(body.model))
    request = dataclasses.replace(asked, priority=body.priority)
    if here.held.full:
        raise TooManyStreams(here.held.limit)
    keep = here.settings.result_ttl_seconds
    new = NewJob(id=f"job_{secrets.token_hex(16)}", request=request, result_ttl_seconds=keep, awaited=True)
    submitted = await here.store.submit(new)
    seconds = here.settings.predict_wait_seconds
    job = await here.wait(new.id, seconds, seen=submitted.job)
    if job.state not in FINAL:
        raise StillRunning(job.id, seconds)
    if job.state is not JobState.SUCCEEDED:
        raise JobNotSucceeded(job.id, _error(job))
    return json_answer({"output_text": _text(job.result or {})}, headers={"content-location": f"/v1/jobs/{job.id}"})


def _request(text: str, card: ModelCard) -> Request:
    if card.text:
        return Request(model=card.name, prompt=text, params=PARAMS)
    return Request(kind=Kind.PREDICT, model=card.name, token_ids=_token_ids(text, card.vocab_size))


def _token_ids(text: str, vocab_size: int) -> tuple[int, ...]:
    words = text.split()
    if not 0 < len(words) <= MAX_PROMPT_TOKENS:
        raise InvalidField("input_text", f"must hold 1 to {MAX_PROMPT_TOKENS} token ids with spaces between")
    for word in words:
        if not (word.isascii() and word.isdecimal() and int(word[:12]) < vocab_size):
            raise InvalidField("input_text", f"must hold token ids from 0 to {vocab_size - 1}, not {word!r:.20}")
    return tuple(int(word) for word in words)


def _text(result: Wire) -> str:
    if "token_ids" in result:
        return " ".join(str(token_id) for token_id in result["token_ids"])
    return str(result["choices"][0]["text"])


def _error(job: Job) -> Wire:
    """The job's own error, with the field named as this route's client wrote it."""
    error = job.error or {"code": f"job_{job.state.value}", "message": f"job {job.id!r} has {job.state.value}"}
    if str(error.get("param") or "").startswith("input"):
        return {**error, "param": "input_text"}
    return error
