"""A small world for the tests of the jobs room: a store on a real Valkey, and the few things workers and clients do."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from core.card import ModelCard
from core.errors import HeadraceError, RequestError
from core.request import Choice, Request, Result, SamplingParams, TokenEvent, Usage
from jobs import keys
from jobs.audit import audit as audit
from jobs.job import Job, NewJob
from jobs.settings import StoreSettings
from jobs.store import Claim, ClaimedJob, LoggedEvent, Outcome, Publication, Settlement, Store, Wanted, WorkerCard

CARD = ModelCard(
    name="toy",
    engine="instant",
    version="0",
    dtype="float32",
    weights="ab" * 32,
    kinds=("generate", "predict"),
    text=True,
    chat=False,
    max_model_len=100,
    vocab_size=10,
)
OTHER = dataclasses.replace(CARD, name="other")
numbers = itertools.count()


def settings(url: str, **changes: Any) -> StoreSettings:
    """Times of the tests: lease 1 s, grace 0.5 s."""
    return StoreSettings(**{"redis_url": url, "lease_seconds": 1.0, "grace_seconds": 0.5, **changes})


def born(store: Store, *names: str, card: ModelCard = CARD) -> None:
    """Workers with a lease."""
    for name in names or ("w",):
        store.birth(WorkerCard(name=name, host="h", pid=1, model=card))


def add(store: Store, job_id: str = "", *, model: str | None = None, priority: int = 0, **fields: Any) -> Job:
    """Submit a small job."""
    request = Request(prompt="Once upon", model=model, params=SamplingParams(max_tokens=4), priority=priority)
    new = NewJob(id=job_id or f"j{next(numbers)}", request=request, **fields)
    return store.submit(new).job


def list_of(priority: int) -> str:
    """Where jobs of such a priority wait that name no model."""
    return keys.URGENT if priority < 0 else keys.LOW if priority > 0 else keys.READY


def take(
    store: Store, worker: str = "w", room: int = 100, running: int = 0, card: ModelCard = CARD
) -> list[ClaimedJob]:
    """What a worker claims."""
    return list(store.claim(Wanted(worker, card, room, running)).jobs)


def claim(store: Store, worker: str = "w", room: int = 100, running: int = 0) -> Claim:
    return store.claim(Wanted(worker, CARD, room, running))


def token(job_id: str, token_id: int = 1, **fields: Any) -> TokenEvent:
    return TokenEvent(job_id=job_id, text=f"w{token_id} ", token_ids=(token_id,), **fields)


def say(job: ClaimedJob, *token_ids: int, first: int | None = None) -> Publication:
    """Publish tokens of a claimed job, one event each."""
    events = [token(job.id, token_id) for token_id in token_ids]
    start = job.next_event if first is None else first
    return Publication(job_id=job.id, attempt=job.attempt, first=start, events=events)


def result(text: str = "w1 ", *token_ids: int) -> Result:
    choice = Choice(text=text, finish_reason="length", token_ids=token_ids or (1,))
    return Result(usage=Usage(prompt_tokens=2, completion_tokens=1), choices=(choice,))


def returned(text: str) -> dict[str, Any]:
    """What RQ shows of a result with one token: ids and log-probabilities are in the log alone."""
    wire = result(text).to_wire()
    [choice] = wire["choices"]
    return {**wire, "choices": [{name: choice[name] for name in ("index", "text", "finish_reason")}]}


def done(job: ClaimedJob, text: str = "w1 ", *token_ids: int) -> Settlement:
    return Settlement(job_id=job.id, attempt=job.attempt, outcome=Outcome.SUCCEEDED, result=result(text, *token_ids))


def said(store: Store, job_id: str) -> list[int]:
    """The token ids published so far, of all choices."""
    return [token_id for choice in store.emitted(job_id) for token_id in choice.token_ids]


def failed(job: ClaimedJob, error: HeadraceError | None = None) -> Settlement:
    error = error or RequestError("no")
    return Settlement(job_id=job.id, attempt=job.attempt, outcome=Outcome.FAILED, error=error)


def ended(job: ClaimedJob, outcome: Outcome, partial: Result | None = None) -> Settlement:
    return Settlement(job_id=job.id, attempt=job.attempt, outcome=outcome, result=partial)


def kill(store: Store, worker: str = "w") -> None:
    """The worker's process dies, and its parent sees it."""
    store.expire_lease(worker)


def wipe_lease(client: Any, worker: str = "w", seconds: float = 0.001) -> None:
    """The worker's lease ran out so long ago."""
    now, micro = client.time()
    client.zadd(keys.LEASES, {worker: now * 1000 + micro / 1000 - seconds * 1000})


def outlast_grace(client: Any, worker: str = "w") -> None:
    """The worker's lease was found over an hour ago."""
    now, _ = client.time()
    client.zadd(keys.MARKS, {worker: (now - 3600) * 1000})


def pass_deadline(client: Any, job_id: str) -> None:
    """The job's deadline is over."""
    client.hset(f"{keys.JOB}{job_id}", "deadline_at", 1)
    client.zadd(keys.DEADLINES, {job_id: 1}, xx=True)


def types(events: Sequence[LoggedEvent]) -> str:
    """The log as letters: s, t, f."""
    return "".join(event.type[0] for event in events)


def text_of(events: Sequence[LoggedEvent]) -> str:
    return "".join(event.fields["text"] for event in events if event.type == "token")


def numbers_of(events: Sequence[LoggedEvent]) -> list[int]:
    return [event.number for event in events]
