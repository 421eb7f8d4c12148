"""A seeded random walk over everything that can happen to jobs, judged at each step, and mutants that it must find.

``tests.model_walk`` takes the steps, ``tests.model_acts`` has the acts, ``tests.model_judge`` and ``tests.model_house``
what must hold after each; ``benchmarks.mutants`` breaks every line.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from jobs import scripting
from jobs.store import Store
from tests.conftest import start_valkey
from tests.jobs_world import settings
from tests.model_acts import ACTS
from tests.model_walk import SETTINGS, walk

STEPS = int(os.environ.get("HEADRACE_MODEL_STEPS", "5000"))
SEED = int(os.environ.get("HEADRACE_MODEL_SEED", "0"))
FAR = (20, 600)  #: walks, and steps of each, that a mutant has at most
SMALL_PIECES = ("local PIECE = 4096", "local PIECE = 3")  #: long logs are packed in several calls


@pytest.fixture(scope="module")
def quick_url() -> Iterator[str]:
    """A real Valkey that writes nothing to its disk: a walk is about what the scripts do."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        server = start_valkey(Path(name), fsync="no")
        with redis.Redis.from_url(server.url) as client:
            client.config_set("appendonly", "no")
        yield server.url
        server.process.kill()
        server.process.wait(10)


@pytest.fixture
def store(quick_url: str) -> Iterator[Store]:
    store = Store(settings(quick_url, **SETTINGS))
    store.connection.flushall()
    yield store
    store.close()


@pytest.fixture
def broken_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the scripts, which the store uses from now on; to be changed before its first call."""
    shutil.copytree(scripting.FOLDER, tmp_path / "scripts")
    monkeypatch.setattr(scripting, "FOLDER", tmp_path / "scripts")
    scripting.scripts.cache_clear()
    yield tmp_path / "scripts"
    scripting.scripts.cache_clear()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has the line to break {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_no_walk_breaks_a_promise(store: Store, broken_scripts: Path, number: int) -> None:
    if number % 2 == 1:
        change(broken_scripts / "lib" / "log.lua", *SMALL_PIECES)
    world = walk(store, SEED + number, STEPS)

    assert STEPS < 2000 or {act.__name__ for act in ACTS} == set(world.acts)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One line broken by hand: in every script that changes something, one at least."""

    script: str
    line: str
    broken: str


MUTANTS = {
    "adopting without noting the kind": Mutant("adopt", "call('HSET', K.job .. id, 'kind', kind, 'model', model)", ""),
    "adopting for whoever asks": Mutant("adopt", "job.attempt ~= attempt or job.status ~= 'started'", "false"),
    "adopting without its priority": Mutant("adopt", "if ARGV[6] ~= '0' then", "if false then"),
    "a birth that leaves the mark": Mutant("birth", "call('ZREM', K.marks, worker)", ""),
    "a birth without a card": Mutant("birth", "call('HSET', K.card .. worker, 'card', ARGV[4])", ""),
    "cancelling what runs at once": Mutant("cancel", "if job.state == 'running' then", "if false then"),
    "taking what others have": Mutant("collect", "call('ZADD', K.outbox, NOW + tonumber(ARGV[2]), callback)", ""),
    "claiming whatever it finds": Mutant("claim", "if job and job.status ~= 'queued' then", "if not job then"),
    "claiming without raising the fence": Mutant("claim", "job.attempt + 1", "math.max(1, job.attempt)"),
    "claiming an ended job with its old log": Mutant("claim", "and job.closed then reopen(id, job) end", "then end"),
    "going on with another's answer": Mutant("claim", "if job.tokens == 0 or job.engine == identity or", "if true or"),
    "starting over under a reader's eyes": Mutant("claim", "job.resume == 'wait' or job.read", "job.resume == 'wait'"),
    "a suspect beside others": Mutant("claim", "and not trusted and job.crashes >= 2", "and false"),
    "the least urgent first": Mutant("claim", "for number = 1, #CLASSES do", "for number = #CLASSES, 1, -1 do"),
    "others' turn when it is not": Mutant("claim", "if turn % 5 == 4 then", "if turn % 5 ~= 4 then"),
    "keeping moved dead letters": Mutant("dead", "if #stale > 0 then", "if false then"),
    "leaving with jobs in hand": Mutant("death", "if call('EXISTS', K.held .. worker) == 1 then", "if false then"),
    "deleting what runs": Mutant("delete", "if not is_final(job.state) or (", "if ("),
    "expiring what runs": Mutant("expire", "if job and job.state == 'queued' then", "if job then"),
    "following without a mark": Mutant("follow", "call('HSET', K.job .. id, 'watched', 1)", "call('PING')"),
    "marking what has ended": Mutant("follow", "and not is_final(job.state)", ""),
    "mending a job into no list": Mutant("mend", "  put_back(id, job)\n  return 'put it at", "  return 'put it at"),
    "noting whatever is said": Mutant("note", "or (state ~= 'delivered' and tonumber(attempts) ~= attempt)", ""),
    "promoting what is not scheduled": Mutant("promote", "if job and job.status == 'scheduled' then", "if job then"),
    "publishing without a fence": Mutant("publish", "if not job or job.attempt ~= attempt then", "if not job then"),
    "publishing twice": Mutant("lib/log", "if number >= job.events then", "if true then"),
    "nobody hears of a reader": Mutant("publish", "job.watched and 5 or 1", "1"),
    "reaping what others hold": Mutant(
        "reap", "job.status == 'started' and job.attempt == tonumber(attempt)", "true"
    ),
    "counting a crash of whoever spoke": Mutant("reap", "job.published_attempt == job.attempt and 1 or", ""),
    "sweeping before the grace": Mutant("reap", "or NOW - marked >= grace", "or true"),
    "reindexing nothing": Mutant("reindex", "if job.place ~= job.state then", "if false then"),
    "releasing without a fence": Mutant("release", "job.attempt ~= attempt or job.status ~= 'started'", "false"),
    "a beat that tells of no lost reply": Mutant("renew", "if not known[member] then", "if false then"),
    "resending at some time": Mutant("resend", "call('ZADD', K.outbox, NOW, job.callback)", ""),
    "retrying what succeeded": Mutant("retry", "if job.state ~= 'failed' or (", "if not is_final(job.state) or ("),
    "retrying with the old log": Mutant("retry", "reopen(id, job)", ""),
    "settling without a fence": Mutant("settle", "if not job or job.attempt ~= attempt then", "if not job then"),
    "settling what does not run": Mutant("settle", "if job.status ~= 'started' and not late then", "if false then"),
    "settling again": Mutant("settle", "if job.settled == attempt then return 2 end", ""),
    "a late failure counts": Mutant("settle", "and outcome == 'succeeded'", ""),
    "showing without a mark": Mutant("show", "call('HSET', K.job .. id, 'read', 1)", "call('PING')"),
    "submitting at the front": Mutant("submit", "call('RPUSH', class.list, id)", "call('LPUSH', class.list, id)"),
    "submitting all as one class": Mutant("submit", "CLASSES[class_of(priority)]", "CLASSES[2]"),
    "submitting twice": Mutant("submit", "if call('EXISTS', K.job .. id) == 1 then", "if false then"),
    "losing the index": Mutant("lib/base", "if state then call('ZADD'", "if state == 'queued' then call('ZADD'"),
    "indexing twice": Mutant("lib/base", "    call('ZREM', K.index .. job.kind .. ':' .. job.place, id)\n", ""),
    "packing what the result does not have": Mutant("lib/log", "(inline and 'I' or 'R')", "'R'"),
    "packing small numbers only": Mutant("lib/log", "varint(math.floor(number / 128))", "varint(0)"),
    "letting go of what is to be delivered": Mutant("lib/outbox", "'state') ~= 'pending' then", "'state') then"),
    "requeueing what was cancelled": Mutant("lib/moves", "if job.cancel_requested then return", "if false then return"),
    "waiting for its like twice": Mutant("lib/moves", "if job.waiting_for == job.engine then return end", ""),
    "waiting for its like without an end": Mutant("lib/moves", "  call('ZADD', K.waits, NOW + patience, id)\n", ""),
    "waiting for it knows not whom": Mutant("lib/moves", "call('HSET', K.job .. id, 'waiting_for', job.engine)", ""),
    "waiting for its like and not waking it": Mutant("lib/moves", "  wake(K.wake .. '.' .. job.engine)\n", ""),
    "a suspect that waits beside others": Mutant(
        "lib/moves", "(job.crashes >= 2 and K.like_suspects or K.like)", "(K.like)"
    ),
    "handing back to another class": Mutant("lib/moves", "CLASSES[job.class].list", "K.ready"),
    "ending twice": Mutant("lib/moves", "if job.closed or not is_final", "if not is_final"),
    "leaving an execution behind": Mutant("lib/moves", "  call('ZREM', K.wip, member)\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_walk_finds_a_mutant(store: Store, broken_scripts: Path, name: str) -> None:
    mutant = MUTANTS[name]
    change(broken_scripts / f"{mutant.script}.lua", mutant.line, mutant.broken)

    with pytest.raises((AssertionError, redis.ResponseError)):
        walk_far(store, SEED)


def walk_far(store: Store, first: int) -> None:
    walks, steps = FAR
    for seed in range(first, first + walks):
        store.connection.flushall()
        walk(store, seed, steps)


def test_every_script_that_changes_something_has_a_mutant() -> None:
    reads = {name for name, script in scripting.scripts().items() if "no-writes" in script.text.split("\n", 1)[0]}
    shared = {f"lib/{part}" for part in scripting.SHARED}

    assert {mutant.script for mutant in MUTANTS.values()} == set(scripting.scripts()) - reads | shared
