"""``status``, ``wait``, ``cancel``, ``retry``, ``resend``, ``list``, ``models``, ``workers``: they look after jobs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

from headrace.answers import Job
from headrace.client import Client
from headrace.errors import Overloaded
from headrace.patience import Patience
from headrace.verbs.verb import CLIENT_SETTINGS, FAILED, OK, UNREACHABLE, Invocation, Verb

SHOWN_CHARACTERS = 100


def status(invocation: Invocation) -> int:
    """Jobs as they are now, or the server itself."""
    with invocation.client() as client:
        if not invocation.arguments.ids:
            return _server_status(invocation)
        for job_id in invocation.arguments.ids:
            _print_job(invocation, client.get(job_id))
    return OK


def _server_status(invocation: Invocation) -> int:
    with invocation.client(Patience(busy_seconds=0)) as client:
        try:
            ready: Mapping[str, Any] = {"ready": True, **client.ready()}
        except Overloaded as error:
            ready = {"ready": False, "reason": error.message}
        workers = client.workers() if ready["ready"] else []
    words = [f"{name} {value}" for name, value in ready.items() if not isinstance(value, Mapping | list)]
    lines = [f"{invocation.settings.url}: {', '.join(words)}", *(f"  {_worker_line(worker)}" for worker in workers)]
    invocation.print({"url": invocation.settings.url, **ready, "workers": list(workers)}, "\n".join(lines))
    return OK if ready["ready"] else UNREACHABLE


def wait(invocation: Invocation) -> int:
    """Wait for jobs; 1 when one of them ended without a result, 5 when time is up."""
    timeout = invocation.arguments.timeout
    deadline = None if timeout is None else time.monotonic() + timeout
    failed = False
    with invocation.client() as client:
        for job_id in invocation.ids():
            job = client.wait(job_id, None if deadline is None else max(0.0, deadline - time.monotonic()))
            _print_job(invocation, job)
            failed = failed or not job.succeeded
    return FAILED if failed else OK


def _each(act: Callable[[Client, str], Job]) -> Callable[[Invocation], int]:
    def run(invocation: Invocation) -> int:
        with invocation.client() as client:
            for job_id in invocation.ids():
                _print_job(invocation, act(client, job_id))
        return OK

    return run


def list_jobs(invocation: Invocation) -> int:
    """The newest jobs."""
    arguments = invocation.arguments
    with invocation.client() as client:
        page = client.list(status=arguments.status, after=arguments.after, limit=arguments.limit)
    for job in page.jobs:
        _print_job(invocation, job)
    return OK


def models(invocation: Invocation) -> int:
    """What is served."""
    with invocation.client() as client:
        for card in client.models():
            words = [str(card[name]) for name in ("dtype", "device", "max_model_len") if name in card]
            invocation.print(card, f"{card['id']}: {', '.join(words)}")
    return OK


def workers(invocation: Invocation) -> int:
    """Who serves it."""
    with invocation.client() as client:
        for worker in client.workers():
            invocation.print(worker, _worker_line(worker))
    return OK


def _worker_line(worker: Mapping[str, Any]) -> str:
    model = worker.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    return f"{worker.get('name')}: {worker.get('state')}, {worker.get('running')} running, {name}"


def _print_job(invocation: Invocation, job: Job) -> None:
    invocation.print(job.wire, f"{job.id} {job.status}{_detail(job)}")


def _detail(job: Job) -> str:
    if job.status == "queued" and job.queue_position is not None:
        return f" (about {job.queue_position} before it)"
    if job.status == "running":
        return f" ({job.tokens_generated} tokens)"
    if job.error_message or job.reason:
        return f": {job.error_message or job.reason}"
    text = " ".join(job.text.split())
    return f": {text[:SHOWN_CHARACTERS]}{'…' if len(text) > SHOWN_CHARACTERS else ''}" if text else ""


def _add_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", nargs="+", help="a job's id; - reads ids from standard input")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", nargs="*", help="a job's id; none: the server")


def _add_wait(parser: argparse.ArgumentParser) -> None:
    _add_ids(parser)
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for all of them together")


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--status", metavar="STATE", help="only jobs in this state")
    parser.add_argument("--after", metavar="ID", help="only jobs older than this one")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (1 to 100)")


def _verb(name: str, text: str, example: str, run: Callable[[Invocation], int], **rest: Any) -> Verb:
    return Verb(name=name, text=text, example=f"headrace {example}", settings=CLIENT_SETTINGS, run=run, **rest)


STATUS = _verb("status", "show jobs, or the server", "status job_5f2c…", status, add=_add_status)
WAIT = _verb("wait", "wait until jobs have ended", "wait job_5f2c… --timeout 60", wait, add=_add_wait)
CANCEL = _verb("cancel", "end jobs", "cancel job_5f2c…", _each(Client.cancel), add=_add_ids)
RETRY = _verb("retry", "queue failed jobs again", "retry job_5f2c…", _each(Client.retry), add=_add_ids)
RESEND = _verb("resend", "tell webhooks of jobs' ends again", "resend job_5f2c…", _each(Client.resend), add=_add_ids)
LIST = _verb("list", "the newest jobs", "list --status failed --limit 50", list_jobs, add=_add_list)
MODELS = _verb("models", "what is served", "models", models)
WORKERS = _verb("workers", "who serves it", "workers --json", workers)
