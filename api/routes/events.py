"""A job's events over HTTP, as they come and after the end."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Query
from starlette.responses import Response

from api import sse
from api.context import Here
from api.errors import TooManyStreams
from api.schema import MAX_EVENT_NUMBER, EventsQuery, JobId

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

LastEventId = Annotated[str, Header(alias="last-event-id", max_length=32)]


Events = Annotated[EventsQuery, Query()]


@router.get("/{job_id}/events")
async def events(
    here: Here, job_id: Annotated[JobId, Path()], query: Events, last_event_id: LastEventId = ""
) -> Response:
    """Server-sent events, numbered from 0; goes on after ``Last-Event-ID``, ``?after=`` or ``?last_event_id=``.

    204 when the client has seen the last event already: a browser then stops asking.
    """
    after = _after(query, last_event_id)
    if await sse.nothing_left(here, job_id, after):
        return Response(status_code=204)
    if here.held.full:
        raise TooManyStreams(here.held.limit)
    return sse.EventStream(sse.frames(here, job_id, after))


def _after(query: EventsQuery, header: str) -> int:
    """The header wins, for a browser that reconnects repeats its first query; one that is no number is ignored."""
    if header.isascii() and header.isdecimal():
        return min(int(header), MAX_EVENT_NUMBER)
    for number in (query.after, query.last_event_id):
        if number is not None:
            return number
    return -1
