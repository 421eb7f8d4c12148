"""How the server is: alive, ready, and in numbers."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from api.answers import json_answer
from api.context import Context, Here
from api.metrics import MEDIA_TYPE, Seen
from core.errors import StoreError, StoreUnavailable, UnsafeServer

router = APIRouter(tags=["state"])


@router.get("/health")
async def health() -> Response:
    """This process lives."""
    return json_answer({"status": "ok"})


@router.get("/ready")
async def ready(here: Here) -> Response:
    """A job sent now would be kept and computed; 503 with the reasons otherwise."""
    reasons = await _reasons(here)
    durability = here.settings.durability
    body = {"status": "unready" if reasons else "ready", "durability": durability, "reasons": reasons}
    if durability == "memory":
        body["warning"] = "202 does not mean on disk: a crash of Redis may lose accepted jobs"
    return json_answer(body, 503 if reasons else 200, {"retry-after": "1"} if reasons else {})


@router.get("/metrics")
async def metrics(here: Here) -> Response:
    """For Prometheus."""
    try:
        queue, workers = await here.fleet.queue(), await here.fleet.workers()
        text = here.metrics.render(Seen(queue=queue, workers=workers, memory=await here.store.memory()))
    except StoreError:
        text = here.metrics.render(None)
    return Response(text, media_type=MEDIA_TYPE)


async def _reasons(here: Context) -> list[str]:
    try:
        await here.store.check()  # what the fleet remembers may be from before
        await here.fleet.server()
        workers = await here.fleet.workers()
    except UnsafeServer as error:
        return [str(error)]
    except StoreUnavailable:
        return ["the job store does not answer"]  # its own words may hold an address
    if here.held.closing:
        return ["the server is stopping"]
    return [] if workers else ["no worker is alive"]
