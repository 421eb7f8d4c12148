"""``run`` and ``submit``: the verbs that ask a model."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from headrace.async_client import AsyncClient
from headrace.calls import DEFAULT_URL, body_of
from headrace.client import Client
from headrace.errors import JobFailed, ServerRefused, Unreachable
from headrace.patience import Patience
from headrace.private import private_server
from headrace.settings import SettingError
from headrace.verbs.serve import MODEL_SETTINGS
from headrace.verbs.verb import CLIENT_SETTINGS, OK, Invocation, Verb, add_sampling

IN_FLIGHT = 64  #: submissions at once; the server writes them to disk in groups
RUN_TOKENS = 256
RESUMES = ("restart", "wait", "any")


def run(invocation: Invocation) -> int:
    """Stream the first answer and print the others, from the server that is up or from a private one."""
    with _some_server(invocation) as client:
        job = client.submit(_run_body(invocation, client))
        if not invocation.json:
            for piece in client.stream(job.id):
                print(piece, end="", flush=True)
            print(flush=True)
            for text in client.get(job.id).texts[1:]:
                print(f"\n{text}", flush=True)
            return OK
        job = client.wait(job.id)
        print(json.dumps(job.wire, ensure_ascii=False), flush=True)
        if not job.succeeded:
            raise JobFailed(job)
        return OK


@contextlib.contextmanager
def _some_server(invocation: Invocation) -> Iterator[Client]:
    """The server at the address, or a private one where no address was given and nobody answers at the usual one."""
    if invocation.settings.url != DEFAULT_URL or _answers(invocation):
        with invocation.client() as client:
            yield client
        return
    invocation.note("no server is up: starting a private one (headrace up keeps one running)")
    with private_server(invocation.settings, invocation.environ) as server:
        with Client(server.url, api_key=server.api_key) as client:
            yield client


def _answers(invocation: Invocation) -> bool:
    """Somebody is there, ready or not."""
    with invocation.client(Patience(broken_tries=0, busy_seconds=0)) as client:
        try:
            client.ready()
        except Unreachable:
            return False
        except ServerRefused:
            return True
        return True


def _run_body(invocation: Invocation, client: Client) -> Mapping[str, Any]:
    """A chat where the model has a template for one, else the text as it stands."""
    arguments = invocation.arguments
    prompt = _text(arguments.prompt)
    model = arguments.setting_model
    cards = [card for card in client.models() if model in (None, card.get("id"))]
    params = {"max_tokens": RUN_TOKENS, **invocation.sampling()}
    if arguments.raw or not any(card.get("chat") for card in cards):
        return body_of(prompt, **params)
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return body_of([*system, {"role": "user", "content": prompt}], **params)


def submit(invocation: Invocation) -> int:
    """Queue jobs and print their ids, in the order of the lines."""
    bodies = [_with_options(invocation, body) for body in _bodies(invocation.arguments)]
    for job_id in asyncio.run(_submit_all(invocation, bodies)):
        invocation.print({"id": job_id}, job_id)
    return OK


async def _submit_all(invocation: Invocation, bodies: Sequence[Mapping[str, Any]]) -> list[str]:
    settings = invocation.settings
    places = asyncio.Semaphore(IN_FLIGHT)
    shown = len(bodies) > 1 and not invocation.json
    with Progress(console=Console(stderr=True), transient=True, disable=not (shown and sys.stderr.isatty())) as bar:
        task = bar.add_task("submitting", total=len(bodies))
        async with AsyncClient(settings.url, api_key=settings.read_api_key()) as client:

            async def one(body: Mapping[str, Any]) -> str:
                async with places:
                    job = await client.submit(body)
                bar.advance(task)
                return job.id

            return list(await asyncio.gather(*(one(body) for body in bodies)))


def _with_options(invocation: Invocation, body: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = invocation.arguments
    extra = {"model": arguments.model, "deadline_seconds": arguments.deadline_seconds}
    extra["refuse_if_late"] = arguments.refuse_if_late or None
    extra |= {"resume": arguments.resume, "cache_salt": arguments.cache_salt, "priority": arguments.priority}
    extra["webhook"] = {"url": arguments.webhook} if arguments.webhook else None
    return {**body_of(body, **invocation.sampling()), **{k: v for k, v in extra.items() if v is not None}}


def _bodies(arguments: argparse.Namespace) -> list[Mapping[str, Any]]:
    """What was asked for: a prompt, a chat, or a job for each line of a file.

    Raises:
        SettingError: not exactly one of them, or a line that cannot be read.
    """
    given = [name for name in ("prompt", "messages", "file") if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise SettingError("give exactly one of PROMPT, --messages and --file")
    if given == ["prompt"]:
        return [body_of(_text(arguments.prompt))]
    if given == ["messages"]:
        return [body_of(_parsed("--messages", _text_or_file(arguments.messages)))]
    lines = [line for line in _text_or_file(arguments.file, always_file=True).splitlines() if line.strip()]
    jsonl = arguments.file.endswith((".jsonl", ".ndjson")) or all(line.lstrip().startswith("{") for line in lines)
    return [line_body(number, line) if jsonl else body_of(line) for number, line in enumerate(lines, 1)]


def line_body(number: int, line: str) -> Mapping[str, Any]:
    """A line of JSON: a whole job, or ``{"prompt": …}`` or ``{"messages": …}`` with parameters beside it."""
    table = _parsed(f"line {number}", line)
    if not isinstance(table, dict):
        raise SettingError(f"line {number}: must be a JSON object")
    if "input" in table:
        return body_of(table)
    asked = [name for name in ("prompt", "messages", "prompt_token_ids") if name in table]
    if len(asked) != 1:
        raise SettingError(f"line {number}: must hold input, prompt, messages or prompt_token_ids")
    params = {name: value for name, value in table.items() if name not in (*asked, "metadata", "model")}
    rest = {name: table[name] for name in ("metadata", "model") if name in table}
    return body_of({"input": {asked[0]: table[asked[0]]}, **rest}, **params)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise SettingError(f"{where}: not JSON: {error}") from error


def _text(prompt: str) -> str:
    return sys.stdin.read() if prompt == "-" else prompt


def _text_or_file(given: str, *, always_file: bool = False) -> str:
    if given == "-":
        return sys.stdin.read()
    if not always_file and given.lstrip().startswith("["):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{given} cannot be read: {error}") from error


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what to ask; - reads standard input")
    parser.add_argument("--raw", action="store_true", help="continue the text as it stands, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    add_sampling(parser)


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to continue; - reads standard input")
    parser.add_argument("--messages", metavar="JSON", help='a chat: [{"role": …, "content": …}], or a file with one')
    parser.add_argument(
        "--file", metavar="FILE", help="a job for each line: plain prompts, or JSON objects; - is stdin"
    )
    parser.add_argument("--model", metavar="NAME", help="the model to ask, where several are served")
    parser.add_argument("--deadline-seconds", type=float, metavar="SECONDS", help="give up so long after submission")
    parser.add_argument(
        "--priority", type=int, metavar="N", help="-100 to 100: the lower, the earlier; negative goes before 0 (0)"
    )
    parser.add_argument(
        "--resume", choices=RESUMES, help="what becomes of a begun answer when only another engine is there (restart)"
    )
    parser.add_argument("--refuse-if-late", action="store_true", help="take no job that the queue keeps beyond that")
    parser.add_argument("--cache-salt", metavar="TEXT", help="share cached prompts only with jobs that say the same")
    parser.add_argument("--webhook", metavar="URL", help="is told when the job has ended")
    add_sampling(parser)


RUN = Verb(
    name="run",
    text="ask once and stream the answer; starts a private server if none is up",
    example='headrace run "Why is the sky blue?" --max-tokens 80',
    settings=(*CLIENT_SETTINGS, *MODEL_SETTINGS),
    run=run,
    add=_add_run,
)
SUBMIT = Verb(
    name="submit",
    text="queue jobs and print their ids",
    example="headrace submit --file prompts.txt --max-tokens 64 | xargs headrace wait",
    settings=CLIENT_SETTINGS,
    run=submit,
    add=_add_submit,
)
