"""Reads what a claim brought: ours as they are, stock RQ's after a look at what they ask for. Knows no connection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from core.card import ModelCard
from core.errors import HeadraceError, ModelNotFound
from core.request import Kind, Request
from jobs import commands, rows
from jobs.scripting import Command
from jobs.work import Claim, ClaimedJob


def read_claim(
    answer: Sequence[Any], card: ModelCard, is_known: Callable[[str], bool]
) -> tuple[Claim, list[Command[int]]]:
    """Decode a claim, and say which adoptions are to be sent for jobs that stock RQ put in.

    Args:
        is_known: whether a model of that name was ever served: its jobs wait for it, those of others fail.
    """
    taken, alone, hold, more = answer
    jobs: list[ClaimedJob] = []
    adoptions: list[Command[int]] = []
    for entry in taken:
        job = _read(entry)
        adoption, routed = _adopt(entry[5], job, card, is_known)
        adoptions += adoption
        if not routed:
            jobs.append(_refuse_other_model(job, card))
    return Claim(jobs=tuple(jobs), alone=bool(alone and jobs), hold=bool(hold), more=bool(more)), adoptions


def _read(entry: Sequence[Any]) -> ClaimedJob:
    job_id, attempt, next_event, crashes, deadline, (data, _, timeout, *rest), watched, young = entry
    seconds = int(timeout or -1)
    return ClaimedJob(
        id=job_id.decode(),
        attempt=attempt,
        request=_request(data, rest),
        next_event=next_event,
        deadline_in_seconds=None if deadline is None else deadline / 1000,
        timeout_seconds=seconds if seconds > 0 else None,
        crashes=crashes,
        watched=bool(watched),
        young=bool(young),
    )


def _request(data: bytes | None, rest: Sequence[Any]) -> Request | HeadraceError:
    *callbacks, repeats, webhooks, _ = rest
    try:
        request = rows.read_request(data or b"")
        rows.refuse_extras(callbacks, repeats, webhooks)
    except HeadraceError as error:
        return error
    return request


def _adopt(
    fields: Sequence[Any], job: ClaimedJob, card: ModelCard, is_known: Callable[[str], bool]
) -> tuple[list[Command[int]], bool]:
    """The adoption of a job that stock RQ put in, and whether it goes to another model's list."""
    if fields[1] is not None:  # the hash says what kind it is: ours, or adopted before
        return [], False
    kind, model, priority = Kind.GENERATE, "", 0
    if isinstance(job.request, Request):
        kind, model, priority = job.request.kind, job.request.model or "", job.request.priority
    route = not _serves(card, model) and is_known(model)
    return [commands.adopt(job, kind, model, priority, rows.read_created(fields[-1]), route=route)], route


def _refuse_other_model(job: ClaimedJob, card: ModelCard) -> ClaimedJob:
    """A job for a model that nobody ever served fails at once rather than wait for ever."""
    if isinstance(job.request, Request) and not _serves(card, job.request.model or ""):
        return dataclasses.replace(job, request=ModelNotFound(job.request.model or "", "no worker serves it"))
    return job


def _serves(card: ModelCard, model: str) -> bool:
    return model.lower() in ("", card.name.lower())
