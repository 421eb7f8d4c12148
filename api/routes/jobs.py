"""Jobs over HTTP: submit, look, list, cancel, retry, forget."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query
from starlette.responses import Response

from api.answers import json_answer, list_answer
from api.bodies import AJob, described
from api.context import Context, Here
from api.errors import IdReused
from api.prefer import MAX_HEADER_CHARACTERS, read_prefer
from api.schema import GenerateBody, JobId, ListQuery, PredictBody, WaitQuery
from core.errors import InvalidField
from core.request import Kind, Request
from jobs.job import FINAL, Job, JobState
from jobs.webhooks import NotAllowed

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

POLL_SECONDS = "1"  #: Retry-After of an unfinished job
SCAN_PAGES = 10  #: pages of 100 looked through for one page of a reason

Id = Annotated[JobId, Path()]
Prefer = Annotated[str, Header(max_length=MAX_HEADER_CHARACTERS)]
ABody = described(GenerateBody, PredictBody)


@router.post("", openapi_extra=ABody, status_code=202)
async def submit(here: Here, body: AJob, prefer: Prefer = "") -> Response:
    """Put a job into the queue; 202 means it is on disk."""
    return await _submit(here, body, f"job_{secrets.token_hex(16)}", prefer)


@router.put("/{job_id}", openapi_extra=ABody, status_code=202)
async def submit_as(here: Here, job_id: Id, body: AJob, prefer: Prefer = "") -> Response:
    """The same under the client's own id: sent again, it answers the same job."""
    return await _submit(here, body, job_id, prefer)


@router.get("")
async def list_jobs(here: Here, query: Annotated[ListQuery, Query()]) -> Response:
    """Jobs, newest first."""
    page, last_id, more = await (_page(here, query) if query.reason is None else _scan(here, query))
    wires = [await here.wire(job) for job in page]
    return list_answer(wires, first_id=page[0].id if page else None, last_id=last_id, has_more=more)


@router.get("/{job_id}")
async def get(here: Here, job_id: Id, query: Annotated[WaitQuery, Query()]) -> Response:
    """One job; with ``wait`` as soon as it has ended, or when the time is over."""
    limit = here.settings.max_wait_seconds
    if query.wait > limit:
        raise InvalidField("wait", f"must be from 0 to {limit:g} seconds, not {query.wait:g}")
    job = await here.wait(job_id, query.wait)
    return json_answer(await here.wire(job), headers={} if job.state in FINAL else {"retry-after": POLL_SECONDS})


@router.post("/{job_id}/cancel")
async def cancel(here: Here, job_id: Id) -> Response:
    """End a job with what it has; a running one ends as soon as its worker hears of it."""
    return json_answer(await here.wire(await here.store.cancel(job_id)))


@router.post("/{job_id}/retry")
async def retry(here: Here, job_id: Id) -> Response:
    """Queue a failed job again."""
    return json_answer(await here.wire(await here.store.retry(job_id)))


@router.post("/{job_id}/webhook/resend")
async def resend(here: Here, job_id: Id) -> Response:
    """Tell the job's webhook of its end again, under the same id."""
    return json_answer(await here.wire(await here.store.resend(job_id)))


@router.delete("/{job_id}", status_code=204)
async def delete(here: Here, job_id: Id) -> Response:
    """Forget an ended job with its request, result and events."""
    await here.store.delete(job_id)
    return Response(status_code=204)


async def _submit(here: Context, body: GenerateBody | PredictBody, job_id: str, prefer: str) -> Response:
    _refuse_uncallable(here, body)
    asked = body.to_request()
    model = await here.fleet.settle(asked.model)
    request = asked if model == asked.model else dataclasses.replace(asked, model=model)
    await here.fleet.refuse_unable(request)
    preference = read_prefer(prefer, here.settings.max_wait_seconds)
    keep, awaited = here.settings.result_ttl_seconds, preference.wait_seconds > 0
    submitted = await here.store.submit(body.to_new_job(job_id, request, result_ttl_seconds=keep, awaited=awaited))
    job = submitted.job
    if not submitted.created and not _same(job.request, asked):
        raise IdReused(job_id)
    if preference.wait_seconds and job.state not in FINAL:
        job = await here.wait(job_id, preference.wait_seconds, seen=job)
    headers = {"location": f"/v1/jobs/{job_id}", "vary": "Prefer"}
    if preference.applied:
        headers["preference-applied"] = preference.applied
    done = job.state in FINAL or not submitted.created
    if job.state not in FINAL:
        headers["retry-after"] = POLL_SECONDS
    return json_answer(await here.wire(job), 200 if done else 202, headers)


def _refuse_uncallable(here: Context, body: GenerateBody | PredictBody) -> None:
    if body.webhook is not None:
        try:
            here.hosts.target(body.webhook.url)
        except NotAllowed as error:
            raise InvalidField("webhook.url", str(error)) from error


def _same(first: Request | None, again: Request) -> bool:
    """A repeat asks for what the first one asked; the model the server chose for that one is no difference."""
    if first is None or (again.model is not None and again.model.casefold() != (first.model or "").casefold()):
        return False
    return first == dataclasses.replace(again, model=first.model)


async def _page(here: Context, query: ListQuery) -> tuple[list[Job], str | None, bool]:
    jobs = await _ask(here, query, query.after, query.limit + 1)
    page = jobs[: query.limit]
    return page, page[-1].id if page else None, len(jobs) > query.limit


async def _scan(here: Context, query: ListQuery) -> tuple[list[Job], str | None, bool]:
    """Jobs with the reason asked for; ``last_id`` is the last one looked at, so that a next page goes on from there."""
    found: list[Job] = []
    last_id = query.after
    for _ in range(SCAN_PAGES):
        jobs = await _ask(here, query, last_id, 100)
        for job in jobs:
            last_id = job.id
            found += [job] if job.reason == query.reason else []
            if len(found) == query.limit:
                return found, last_id, True
        if len(jobs) < 100:
            return found, last_id, False
    return found, last_id, True


async def _ask(here: Context, query: ListQuery, after: str | None, limit: int) -> list[Job]:
    states, kinds = query.status or list(JobState), query.kind or list(Kind)
    return await here.store.list(states=states, kinds=kinds, after=after, limit=limit)
