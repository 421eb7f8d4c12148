"""Breaks each script that changes something in one place after the other, and reports what nobody notices.

A mutant deletes a call that writes, negates a condition, swaps a comparison or drops a ``return``. The walks of the
model test look first; for those they do not find, ``mutants.toml`` names the test that does, which is run, or says why
nobody could. Some scripts only: ``python -m benchmarks.mutants --scripts claim lib/log --seeds 8``; in pieces of some
minutes, as often as it takes: ``python -m benchmarks.mutants --keep verdicts.jsonl --minutes 4``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.mutation import ROOT, House, Mutant, changers, mutants
from benchmarks.rig import describe_machine

REASONS = Path(__file__).with_suffix(".toml")
WALK, TEST, SAME, OPEN = ENDS = ("walk", "test", "same", "open")  #: what may come of a mutant
MORE_TO_DO = 75  #: exit status


@dataclass(frozen=True, slots=True)
class Reason:
    """Of a mutant that no walk finds: the test that does, or why it breaks nothing that anybody is promised."""

    test: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a mutant, and by what or why."""

    name: str
    end: str
    word: str = ""


def read_reasons() -> dict[str, Reason]:
    """By the names of the mutants."""
    groups = tomllib.loads(REASONS.read_text(encoding="utf-8"))["group"]
    return {name: Reason(group.get("test", ""), group.get("why", "")) for group in groups for name in group["mutants"]}


def judge(house: House, mutant: Mutant, reason: Reason | None, options: argparse.Namespace) -> Verdict:
    """Let the walks look, and then the test that is named."""
    if how := house.walks_find(mutant, options.seeds, options.steps):
        return Verdict(mutant.name, WALK, how)
    if reason is None:
        return Verdict(mutant.name, OPEN)
    if reason.test:
        return Verdict(mutant.name, TEST if house.test_finds(mutant, reason.test) else OPEN, reason.test)
    return Verdict(mutant.name, SAME, reason.why)


class Notes:
    """Verdicts, in a file if there is one: what earlier pieces of a run left there counts, if its commit was this."""

    def __init__(self, path: Path | None, run: str) -> None:
        self.path = path
        self.verdicts: dict[str, Verdict] = {}
        if path and path.exists():
            first, *rest = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if first != run:
                sys.exit(f"{path} is of {first}, this is {run}")
            self.verdicts = {found["name"]: Verdict(**found) for found in rest}
        elif path:
            path.write_text(json.dumps(run) + "\n", encoding="utf-8")

    def add(self, verdict: Verdict) -> None:
        self.verdicts[verdict.name] = verdict
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")


def judge_all(chosen: Sequence[Mutant], options: argparse.Namespace) -> Iterator[Verdict]:
    """Verdicts as they come, for so many minutes."""
    until = time.monotonic() + options.minutes * 60
    tasks: multiprocessing.Queue[Mutant | None] = multiprocessing.Queue()
    verdicts: multiprocessing.Queue[Verdict | None] = multiprocessing.Queue()
    for mutant in [*chosen, *[None] * options.processes]:
        tasks.put(mutant)
    workers = [
        multiprocessing.Process(target=_work, args=(tasks, verdicts, until, options), daemon=True)
        for _ in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        yield from iter(verdicts.get, None)
    tasks.cancel_join_thread()


def _work(tasks: Any, verdicts: Any, until: float, options: argparse.Namespace) -> None:
    reasons = read_reasons()
    try:
        with tempfile.TemporaryDirectory(prefix="hr-") as folder, contextlib.closing(House(Path(folder))) as house:
            if how := house.walks_find(None, options.seeds, options.steps):
                raise AssertionError(f"the scripts as they are do not pass: {how}")
            while time.monotonic() < until and (mutant := tasks.get()):
                verdicts.put(judge(house, mutant, reasons.get(mutant.name), options))
    finally:
        verdicts.put(None)


def report(chosen: Sequence[Mutant], found: Mapping[str, Verdict], run: str) -> Iterator[str]:
    """The whole of it, as Markdown."""
    count = Counter(found[each.name].end for each in chosen)
    yield "# Mutants\n"
    yield f"`{run}`, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())}, {describe_machine()}.\n"
    yield f"{len(chosen)} mutants: {count[WALK]} are found by a walk of the model test, {count[TEST]} by a test that"
    yield f"is named below (and was run), {count[SAME]} break nothing that is promised, {count[OPEN]} nobody noticed."
    yield "\n| script | mutants | by a walk | by a test | nothing broken | not noticed |\n|---|---|---|---|---|---|"
    for script in dict.fromkeys(each.script for each in chosen):
        ends = Counter(found[each.name].end for each in chosen if each.script == script)
        yield f"| {script} | {ends.total()} | {' | '.join(str(ends[end]) for end in ENDS)} |"
    for end, title in ((OPEN, "Not noticed"), (TEST, "Found by a test"), (SAME, "Nothing broken")):
        if count[end]:
            yield f"\n## {title}"
        for word in dict.fromkeys(each.word for each in found.values() if each.end == end):
            yield f"\n{word if end == SAME else f'`{word}`'}\n" if word else ""
            for each in chosen:
                if (found[each.name].end, found[each.name].word) == (end, word):
                    yield f"* `{each.script}:{each.line}` {each.how}: `{each.old}`"


def describe_run(options: argparse.Namespace) -> str:
    """The command, but for how it was cut in pieces, and the commit."""
    words = [f"--{name} {' '.join(options.scripts)}" for name in ["scripts"] if options.scripts != changers()]
    words += [f"--{name} {value}" for name, value in (("steps", options.steps), ("seeds", options.seeds))]
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f"python -m benchmarks.mutants {' '.join(words)}` at commit `{told.stdout.strip() or 'unknown'}"


def main() -> int:
    """Break one line after the other, and say what nobody noticed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("--scripts", nargs="*", default=changers(), help="which ones (all that change something)")
    parser.add_argument("--steps", type=int, default=600, help="of a walk (%(default)s)")
    parser.add_argument("--seeds", type=int, default=12, help="walks for each mutant (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="walks at once (%(default)s)")
    parser.add_argument("--keep", type=Path, help="keep verdicts here, and take those that are there")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="stop then; exit status 75 if more is to do")
    parser.add_argument("--survivors", action="store_true", help="only those that mutants.toml has a reason for")
    parser.add_argument("--found", action="store_true", help="say what found each, as it comes")
    options = parser.parse_args()
    reasons, run = read_reasons(), describe_run(options)
    if options.keep and run.endswith("-dirty"):
        sys.exit("pieces must be of one commit, and there are changes that are in none")
    chosen = [
        each for name in options.scripts for each in mutants(name) if not options.survivors or each.name in reasons
    ]
    notes = Notes(options.keep, run)
    for verdict in judge_all([each for each in chosen if each.name not in notes.verdicts], options):
        notes.add(verdict)
        if options.found or verdict.end == OPEN:
            print(f"{verdict.end}: {verdict.name} {verdict.word}", file=sys.stderr, flush=True)
    if left := [each for each in chosen if each.name not in notes.verdicts]:
        print(f"{len(left)} of {len(chosen)} are left", file=sys.stderr)
        return MORE_TO_DO
    print("\n".join(report(chosen, notes.verdicts, run)))
    needless = set(reasons) - {name for name, each in notes.verdicts.items() if each.end != WALK}
    for name in sorted(needless if options.scripts == changers() else ()):
        print(f"needs no reason: {name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
