"""Dead letters over HTTP: list, retry, purge. One alone is looked at, retried and forgotten as a job."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.answers import json_answer, list_answer
from api.bodies import ARetry, described
from api.context import Here
from api.schema import PageQuery, RetryBody

router = APIRouter(prefix="/v1/dead-letters", tags=["dead letters"])


@router.get("")
async def list_dead_letters(here: Here, query: Annotated[PageQuery, Query()]) -> Response:
    """Jobs that were running each time their worker died, the last to die first."""
    page = await here.store.dead.page(query.after, query.limit)
    wires = [await here.wire(job) for job in page.jobs]
    ids: list[str | None] = [*(job.id for job in page.jobs)] or [None]
    return list_answer(wires, first_id=ids[0], last_id=ids[-1], has_more=page.more)


@router.post("/retry", openapi_extra=described(RetryBody, required=False))
async def retry(here: Here, body: ARetry) -> Response:
    """Queue these, or without a body all of them, again."""
    moved = await here.store.dead.retry(body.ids)
    return json_answer({"retried": len(moved.ids), "ids": moved.ids, "skipped": moved.skipped, "has_more": moved.more})


@router.delete("")
async def purge(here: Here) -> Response:
    """Forget all of them."""
    moved = await here.store.dead.purge()
    return json_answer({"deleted": len(moved.ids), "has_more": moved.more})
