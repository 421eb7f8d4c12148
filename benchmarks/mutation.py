"""A script with one line broken, and whether a walk of the model test or a named test notices. Writes no report."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from core.errors import HeadraceError
from jobs import scripting
from jobs.store import Store
from tests.conftest import Server, start_valkey
from tests.jobs_world import settings
from tests.model_walk import SETTINGS, walk

FOLDER = scripting.FOLDER
ROOT = Path(__file__).parent.parent
SWAPS = ((" <= ", " > "), (" >= ", " < "), (" < ", " >= "), (" > ", " <= "), (" == ", " ~= "), (" ~= ", " == "))
#: How a walk ends that finds something.
FINDS = (AssertionError, redis.RedisError, HeadraceError, LookupError, ValueError, TypeError, AttributeError)
SMALL_PIECES = ("local PIECE = 4096", "local PIECE = 3")  #: long logs are packed in several calls

LONGEST_SECONDS = 20  #: a walk takes one; a page that never is right, or a sweep that always has more, takes for ever


@dataclass(frozen=True, slots=True)
class Mutant:
    """One script with one line broken."""

    script: str
    line: int  #: from 1
    how: str
    old: str
    new: str

    @property
    def name(self) -> str:
        """The same wherever in its script the line stands."""
        return f"{self.script}: {self.how}: {self.old}"


def changers() -> list[str]:
    """The scripts that change something, and what they share."""
    own = [name for name, script in scripting.scripts().items() if "no-writes" not in script.text.split("\n", 1)[0]]
    return [*own, *(f"lib/{part}" for part in scripting.SHARED)]


def mutants(script: str) -> Iterator[Mutant]:
    """Every break of a script, in the order of its lines; one that has the name of an earlier one is numbered."""
    seen: Counter[tuple[str, str]] = Counter()
    for number, text in enumerate((FOLDER / f"{script}.lua").read_text(encoding="utf-8").splitlines(), 1):
        code = text.partition("--")[0].rstrip()
        if not code or text.startswith("#!") or "local clock" in code:
            continue
        for how, new in _breaks(code):
            if new != code:
                seen[how, text.strip()] += 1
                times = seen[how, text.strip()]
                yield Mutant(script, number, how if times == 1 else f"{how} ({times})", text.strip(), new)


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
        bare = re.search(r"\breturn(?= end\b|$)", code)  # what it returned must go somewhere
        yield "drop the return", re.sub(r"\breturn\b", "" if bare else "local _ =", code, count=1)


class House:
    """A Valkey of its own, a copy of the scripts to break, and what is to notice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scripts = folder / "scripts"
        self._start()
        signal.signal(signal.SIGALRM, _give_up)

    def _start(self) -> None:
        self.server: Server = start_valkey(self.folder, fsync="no")
        self.client = redis.Redis.from_url(self.server.url)
        self.client.config_set("appendonly", "no")
        self.client.config_set("busy-reply-threshold", 500)

    def close(self) -> None:
        self.client.close()
        self.server.process.kill()
        self.server.process.wait(10)

    def walks_find(self, mutant: Mutant | None, seeds: int, steps: int) -> str:
        """How the walks find it, in a few words; empty if they do not."""
        self._break(mutant)
        scripting.FOLDER = self.scripts
        self._flush()
        self._compile(mutant)
        for seed in range(seeds):
            if seed == 1:  # this one and those behind it pack in pieces
                log = self.scripts / "lib" / "log.lua"
                log.write_text(log.read_text(encoding="utf-8").replace(*SMALL_PIECES), encoding="utf-8")
            scripting.scripts.cache_clear()
            if how := self._walk(seed, steps):
                return how
        return ""

    def test_finds(self, mutant: Mutant | None, test: str) -> bool:
        """Whether a test fails with it."""
        self._break(mutant)
        code = "import sys; from pathlib import Path; from jobs import scripting; import pytest; "
        code += f"scripting.FOLDER = Path({str(self.scripts)!r}); sys.exit(pytest.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "-qx", "-p", "no:cacheprovider", test]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        if ended.returncode not in (0, 1):
            raise RuntimeError(f"{test} does not run: {ended.stdout.decode()[-300:]}")
        return ended.returncode == 1

    def _break(self, mutant: Mutant | None) -> None:
        shutil.rmtree(self.scripts, ignore_errors=True)
        shutil.copytree(FOLDER, self.scripts)
        if mutant:
            path = self.scripts / f"{mutant.script}.lua"
            lines = path.read_text(encoding="utf-8").split("\n")
            lines[mutant.line - 1] = mutant.new
            path.write_text("\n".join(lines), encoding="utf-8")

    def _flush(self) -> None:
        try:
            self.client.flushall()
        except redis.RedisError:  # a script that never ends
            self.close()
            self._start()

    def _compile(self, mutant: Mutant | None) -> None:
        """Whoever breaks the language is found by everybody."""
        scripting.scripts.cache_clear()
        try:
            for script in scripting.scripts().values():
                self.client.script_load(script.text)
        except redis.ResponseError as error:
            raise ValueError(f"{mutant} does not compile: {error}") from error

    def _walk(self, seed: int, steps: int) -> str:
        self._flush()
        store = Store(settings(self.server.url, **SETTINGS))
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
