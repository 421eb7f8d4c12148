"""What is served and by whom."""

from __future__ import annotations

import dataclasses

from fastapi import APIRouter
from starlette.responses import Response

from api.answers import list_answer
from api.context import Here

router = APIRouter(prefix="/v1", tags=["fleet"])


@router.get("/models")
async def models(here: Here) -> Response:
    """The models of live workers."""
    cards = await here.fleet.live()
    return list_answer([{"id": name, "object": "model", **card.to_wire()} for name, card in sorted(cards.items())])


@router.get("/workers")
async def workers(here: Here) -> Response:
    """The workers with a live lease."""
    found = []
    for worker in await here.fleet.workers():
        model = worker.model.name if worker.model is not None else None
        found.append({**dataclasses.asdict(worker), "object": "worker", "model": model})
    return list_answer(found)
