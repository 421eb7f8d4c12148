"""A worker's report: the commands of one pipeline, and what their answers say. Knows no connection."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jobs import commands
from jobs.scripting import Command
from jobs.work import Publication, Reported, Settlement

PART = 64  #: jobs whose events one call of the script appends


class Batch:
    """The events and ends of one report, the last events of an attempt in the call that ends it."""

    def __init__(self, publications: Sequence[Publication], settlements: Sequence[Settlement]) -> None:
        """Take them; of an attempt there is one publication at most."""
        words = {(each.job_id, each.attempt): each for each in publications}
        ends = [commands.settle(each, words.pop((each.job_id, each.attempt), None)) for each in settlements]
        rest = [*words.values()]
        self._parts = [rest[i : i + PART] for i in range(0, len(rest), PART)]
        self._job_ids = [*(each.job_id for each in rest), *(each.job_id for each in settlements)]
        self.commands: list[Command[Any]] = [*map(commands.publish, self._parts), *ends]

    def read(self, answers: Sequence[Any]) -> Reported:
        """What became of them."""
        parts = len(self._parts)
        codes = [*itertools.chain.from_iterable(answers[:parts]), *answers[parts:]]
        told: dict[int, list[str]] = {}
        for job_id, code in zip(self._job_ids, codes, strict=True):
            told.setdefault(code, []).append(job_id)
        return Reported(
            refused=frozenset(told.get(commands.REFUSED, ())),
            cancels=frozenset(told.get(commands.CANCEL_WANTED, ())),
            watched=frozenset(told.get(commands.WATCHED, ())),
            with_dependents=tuple(told.get(commands.HAS_DEPENDENTS, ())),
        )
