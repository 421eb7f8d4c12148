"""Dead letters, jobs that were running each time their worker died: listed, retried, forgotten. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from core.errors import JobNotFound
from jobs import rows
from jobs.job import Job
from jobs.runner import AsyncRunner
from jobs.scripting import Command

PAGE = 100  #: jobs that one round reads and moves
MOST_ROUNDS = 20
MOVED = 1  #: what a script answers for a job it moved
ONLY_DEAD = "dead"  #: tells ``retry`` and ``delete`` to leave alone what is no dead letter by then


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Dead letters, newest first."""

    jobs: tuple[Job, ...]
    more: bool  #: there are others behind them


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What became of dead letters that were retried or forgotten."""

    ids: tuple[str, ...]  #: of those that were
    skipped: tuple[str, ...] = ()  #: those asked for that are no dead letters, or no more
    more: bool = False  #: the bound of one call was met: call again


class DeadLetters:
    """The operations on them. Each may raise StoreUnavailable; calling it again is harmless."""

    def __init__(self, runner: AsyncRunner) -> None:
        self._runner = runner

    async def page(self, after: str | None = None, limit: int = 20) -> Page:
        """Those that died before ``after`` did.

        Raises:
            JobNotFound: ``after`` is no dead letter.
        """
        return await self._runner.run(page(after, limit))

    async def retry(self, ids: Collection[str] | None = None) -> Moved:
        """Queue these, or all of them, again: from their beginning, and as suspects that run alone."""
        return await self._move("retry", ids)

    async def purge(self) -> Moved:
        """Forget all of them, with requests and events."""
        return await self._move("delete", None)

    async def _move(self, script: str, ids: Collection[str] | None) -> Moved:
        if ids is not None:
            asked = tuple(dict.fromkeys(ids))
            moved = await self._apply(script, asked)
            return Moved(ids=moved, skipped=tuple(job_id for job_id in asked if job_id not in moved))
        moved = ()
        for _ in range(MOST_ROUNDS):
            found = await self.page(limit=PAGE)
            moved += await self._apply(script, [job.id for job in found.jobs])
            if not found.more:
                return Moved(ids=moved)
        return Moved(ids=moved, more=True)

    async def _apply(self, script: str, ids: Collection[str]) -> tuple[str, ...]:
        answers = await self._runner.answers([Command(script, [job_id, ONLY_DEAD], list) for job_id in ids])
        return tuple(job_id for job_id, answer in zip(ids, answers, strict=True) if answer[0] == MOVED)


def page(after: str | None, limit: int) -> Command[Page]:
    """Read a page; its decoding raises JobNotFound."""

    def decode(answer: Any) -> Page:
        found, jobs, more = answer
        if not found:
            raise JobNotFound(after or "")
        read = (rows.read_row(row) for row in jobs)
        return Page(jobs=tuple(row.job for row in read if row is not None), more=bool(more))

    return Command("dead", [after or "", limit], decode)
