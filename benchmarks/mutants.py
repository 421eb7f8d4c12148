"""Breaks each script that changes something in one place after the other, and lists which the walk does not find.

A mutant deletes a call that writes, negates a condition, swaps a comparison or drops a ``return``. A lost call or a
changed decision that no walk notices is either equivalent, or a hole in the model test:
``python -m benchmarks.mutants --scripts claim lib/log --seeds 8``.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from core.errors import HeadraceError
from jobs import scripting
from jobs.store import Store
from tests.conftest import Server, start_valkey
from tests.jobs_world import settings
from tests.model_walk import walk

FOLDER = scripting.FOLDER
SWAPS = ((" <= ", " > "), (" >= ", " < "), (" < ", " >= "), (" > ", " <= "), (" == ", " ~= "), (" ~= ", " == "))
#: How a walk ends that finds something.
FINDS = (AssertionError, redis.RedisError, HeadraceError, LookupError, ValueError, TypeError, AttributeError)
SMALL_PIECES = ("local PIECE = 4096", "local PIECE = 3")  #: long logs are packed in several calls

LONGEST_SECONDS = 20  #: a walk takes two; a page that never is right, or a sweep that always has more, takes for ever


@dataclass(frozen=True, slots=True)
class Mutant:
    """One script with one line broken."""

    script: str
    line: int  #: from 1
    how: str
    old: str
    new: str


def changers() -> list[str]:
    """The scripts that change something, and what they share."""
    own = [name for name, script in scripting.scripts().items() if "no-writes" not in script.text.split("\n", 1)[0]]
    return [*own, *(f"lib/{part}" for part in scripting.SHARED)]


def mutants(script: str) -> Iterator[Mutant]:
    """Every break of a script, in the order of its lines."""
    for number, text in enumerate((FOLDER / f"{script}.lua").read_text(encoding="utf-8").splitlines(), 1):
        code = text.partition("--")[0].rstrip()
        if not code or text.startswith("#!") or "local clock" in code:
            continue
        for how, new in _breaks(code):
            if new != code:
                yield Mutant(script, number, how, text.strip(), new)


def _breaks(code: str) -> Iterator[tuple[str, str]]:
    stripped = code.strip()
    if re.match(r"call\(.*\)$", stripped):
        yield "delete the call", ""
    for found in re.finditer(r"(?:then|do|else|;) (call\([^()]*(?:\([^()]*\)[^()]*)*\))", code):
        yield "delete the call", code[: found.start(1)] + code[found.end(1) :]
    for found in re.finditer(r"\b(?:else)?if (.+?) then", code):
        yield "negate the condition", f"{code[: found.start(1)]}not ({found[1]}){code[found.end(1) :]}"
    for old, new in SWAPS:
        for at in (found.start() for found in re.finditer(re.escape(old), code)):
            yield f"swap{old}for{new}".rstrip(), code[:at] + new + code[at + len(old) :]
    for found in re.finditer(r" (and|or) ", code):
        if code[: found.start()].count("'") % 2:
            continue  # a word
        other = " or " if found[1] == "and" else " and "
        yield f"swap {found[1]} for{other}".rstrip(), code[: found.start()] + other + code[found.end() :]
    if re.search(r"\breturn\b", code) and not re.match(r"(local )?function", stripped):
        yield "drop the return", re.sub(r"\breturn( (call|finish|forget)\()?", _without, code, count=1)


def _without(found: re.Match[str]) -> str:
    """A function that is called last is called still; a bare value must go somewhere."""
    return f"{found[2]}(" if found[2] else "local _ ="


class House:
    """A Valkey of its own, and the walks that run on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start()

    def _start(self) -> None:
        self.server: Server = start_valkey(self.folder, fsync="no")
        self.client = redis.Redis.from_url(self.server.url)
        self.client.config_set("appendonly", "no")
        self.client.config_set("busy-reply-threshold", 500)

    def close(self) -> None:
        self.client.close()
        self.server.process.kill()
        self.server.process.wait(10)

    def kills(self, mutant: Mutant | None, seeds: int, steps: int) -> str:
        """How the walks find it, in a few words; empty if they do not."""
        scripts = self.folder / "scripts"
        shutil.rmtree(scripts, ignore_errors=True)
        shutil.copytree(FOLDER, scripts)
        if mutant:
            path = scripts / f"{mutant.script}.lua"
            lines = path.read_text(encoding="utf-8").split("\n")
            lines[mutant.line - 1] = mutant.new
            path.write_text("\n".join(lines), encoding="utf-8")
        scripting.FOLDER = scripts
        for seed in range(seeds):
            if seed == 1:  # this one and those behind it pack in pieces
                log = scripts / "lib" / "log.lua"
                log.write_text(log.read_text(encoding="utf-8").replace(*SMALL_PIECES), encoding="utf-8")
            scripting.scripts.cache_clear()
            if how := self._walk(seed, steps):
                return how
        return ""

    def _walk(self, seed: int, steps: int) -> str:
        try:
            self.client.flushall()
        except redis.RedisError:  # a script that never ends
            self.close()
            self._start()
        store = Store(settings(self.server.url, durability="memory"))
        signal.alarm(LONGEST_SECONDS)
        try:
            walk(store, seed, steps)
        except FINDS as error:
            return f"{type(error).__name__}, seed {seed}: {str(error).replace(chr(10), ' ')[:160]}"
        finally:
            signal.alarm(0)
            store.close()
        return ""


def _give_up(number: int, frame: object) -> None:
    raise AssertionError("goes round and round")


def _survivors(report: str) -> set[tuple[str, str, str]]:
    """Script, break and line of what an earlier run did not find; the lines may have moved since."""
    found = re.findall(r"^\* `([\w/]+):\d+` ([^:]*): `(.*)`$", report, re.MULTILINE)
    return {(script, how, old) for script, how, old in found}


def main() -> int:
    """Break one line after the other, and say what no walk noticed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("--scripts", nargs="*", default=changers(), help="which ones (all that change something)")
    parser.add_argument("--steps", type=int, default=600, help="of a walk (%(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="walks for each mutant (%(default)s)")
    parser.add_argument("--again", type=Path, help="a report of this program's: only what was not found then")
    parser.add_argument("--found", action="store_true", help="list those that are found, too, and by what")
    options = parser.parse_args()
    chosen = [each for name in options.scripts for each in mutants(name)]
    if options.again:
        left = _survivors(options.again.read_text(encoding="utf-8"))
        chosen = [each for each in chosen if (each.script, each.how, each.old) in left]
    signal.signal(signal.SIGALRM, _give_up)
    verdicts: dict[str, list[bool]] = {name: [] for name in options.scripts}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, contextlib.closing(House(Path(folder))) as house:
        if how := house.kills(None, options.seeds, options.steps):
            sys.exit(f"the scripts as they are do not pass: {how}")
        for mutant in chosen:
            how = house.kills(mutant, options.seeds, options.steps)
            verdicts[mutant.script].append(bool(how))
            if options.found or not how:
                print(f"* `{mutant.script}:{mutant.line}` {mutant.how}: `{mutant.old}`", flush=True)
                print(f"  {how}\n" if how else "", end="")
    print("\n| script | mutants | found | not |\n|---|---|---|---|")
    total = [each for found in verdicts.values() for each in found]
    for name, found in [*verdicts.items(), ("all", total)]:
        print(f"| {name} | {len(found)} | {sum(found)} | {len(found) - sum(found)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
