"""The demo over HTTP: submits the workload, shows it being batched, and reports. Starts nothing itself."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import indent
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace import workload
from headrace.answers import Job
from headrace.async_client import AsyncClient

LOOK_SECONDS = 0.25  #: between two looks in a terminal
LINE_SECONDS = 2.0  #: between two lines elsewhere
FIGURES_SECONDS = 15.0  #: how long the workers' last figures may take to arrive
SHOWN_CHARACTERS = 400
INDENT = "    "


class Demo:
    """One run against one server that does nothing else."""

    def __init__(self, url: str, api_key: str, *, shown: bool) -> None:
        self._url = url
        self._api_key = api_key
        self._shown = shown

    async def run(self, workers: int) -> dict[str, Any]:
        """Submit, watch, and return what ``demo.json`` holds."""
        async with AsyncClient(self._url, api_key=self._api_key) as client:
            [card] = await client.models()
            bodies = workload.jobs(chat=bool(card["chat"]))
            started = time.monotonic()
            submitted = await asyncio.gather(*(client.submit(body) for body in bodies))
            await self._watch(client, [job.id for job in submitted])
            seconds = time.monotonic() - started
            ended = await asyncio.gather(*(client.get(job.id) for job in submitted))
            rows = await _decode_rows(client, sum(job.tokens_generated for job in ended), workers)
        return _report(card, list(zip(bodies, ended, strict=True)), rows, seconds)

    async def _watch(self, client: AsyncClient, ids: Sequence[str]) -> None:
        if not self._shown:
            await asyncio.gather(*(client.wait(job_id) for job_id in ids))
            return
        console = Console()
        if not console.is_terminal:
            await _follow(client, len(ids), LINE_SECONDS, lambda jobs: print(_line(jobs), flush=True))
            return
        with Live(console=console, auto_refresh=False) as live:
            await _follow(client, len(ids), LOOK_SECONDS, lambda jobs: live.update(_table(jobs), refresh=True))


async def _follow(client: AsyncClient, count: int, seconds: float, show: Callable[[Sequence[Job]], None]) -> None:
    """Show all jobs again and again until each has ended; what is shown last is the end."""
    while True:
        page = await client.list(limit=min(count, 100))
        show(page.jobs)
        if all(job.ended for job in page.jobs):
            return
        await asyncio.sleep(seconds)


async def _decode_rows(client: AsyncClient, tokens: int, workers: int) -> Counter[int]:
    """Rows in a decode step, and how many steps had so many; workers report with their next beat."""
    deadline = time.monotonic() + FIGURES_SECONDS
    while True:
        stats = [worker.get("stats") or {} for worker in await client.workers()]
        counted = sum(int(one.get("generated_tokens", 0)) for one in stats)
        if counted >= tokens or time.monotonic() > deadline:
            return _sum(one.get("decode_rows") or {} for one in stats[:workers])
        await asyncio.sleep(0.1)


def _sum(histograms: Iterable[Mapping[str, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update({int(rows): int(steps) for rows, steps in histogram.items()})
    return total


def _report(
    card: Mapping[str, Any], jobs: Sequence[tuple[Mapping[str, Any], Job]], rows: Counter[int], seconds: float
) -> dict[str, Any]:
    tokens = sum(job.usage.get("completion_tokens", 0) for _, job in jobs)
    steps = sum(rows.values())
    return {
        "model": card["id"],
        "dtype": card["dtype"],
        "weights": card["weights"],
        "jobs": [_entry(body, job) for body, job in jobs],
        "decode_rows": {str(count): rows[count] for count in sorted(rows)},
        "mean_decode_batch": sum(count * n for count, n in rows.items()) / steps if steps else 0.0,
        "completion_tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }


def _entry(body: Mapping[str, Any], job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        **body["input"],
        "params": body["params"],
        "status": job.status,
        "text": job.text,
        "token_ids": job.token_ids,
        "finish_reason": job.finish_reason,
        "usage": dict(job.usage),
        "error": job.error,
    }


def _line(jobs: Sequence[Job]) -> str:
    states = Counter(job.status for job in jobs)
    done, running = sum(job.ended for job in jobs), states["running"]
    tokens = sum(job.tokens_generated for job in jobs)
    return f"{done} of {len(jobs)} done, {running} in the batch, {states['queued']} queued, {tokens} tokens"


def _table(jobs: Sequence[Job]) -> Table:
    """A cell per job, filled as its tokens come; the batch is what is green and growing."""
    colours = {"queued": "dim", "running": "green", "succeeded": "blue"}
    grid = Table.grid(padding=(0, 1))
    cells = [
        Text(f"{i + 1:>3} {job.status:<9} {job.tokens_generated:>3}", colours.get(job.status, "red"))
        for i, job in enumerate(reversed(jobs))
    ]
    for start in range(0, len(cells), 4):
        grid.add_row(*cells[start : start + 4])
    grid.caption = _line(jobs)
    return grid


def print_answers(jobs: Sequence[Mapping[str, Any]]) -> None:
    """Question and answer, one after the other."""
    for number, job in enumerate(jobs, 1):
        asked = job.get("prompt") or job["messages"][-1]["content"]
        answer = job["text"] if job["status"] == "succeeded" else f"[{job['status']}] {job['error']}"
        cut = answer if len(answer) <= SHOWN_CHARACTERS else f"{answer[:SHOWN_CHARACTERS]}…"
        print(f"\n{number:>2}. {indent(asked.strip(), INDENT).lstrip()}\n{indent(cut.strip(), INDENT)}", flush=True)
