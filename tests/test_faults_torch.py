"""The real engine under a worker that dies: successors go on to the very tokens of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis
from rq.job import Job

from core.engine import Engine, EngineConfig
from core.request import Kind, Request
from jobs import keys
from tests.faults_world import kill_holders
from tests.jobs_world import audit
from tests.proxy import kill, proxied
from tests.tiny_models import VOCAB, make
from tests.worker_world import await_end, eventually, put_wire, tokens, whole, worker

JOBS = 16


def wire(n: int) -> dict[str, Any]:
    """A job of 100 tokens a choice: greedy, or drawn with a seed."""
    params = {"max_tokens": 100, "n": 1 + n % 3, "ignore_eos": True, "temperature": (n % 2) * 0.9, "seed": n}
    return {"input": {"prompt_token_ids": [(7 * n + k) % VOCAB for k in range(1 + n)]}, "params": params}


def attempt(job: Job) -> int:
    return int(job.connection.hget(f"{keys.JOB}{job.id}", "attempt"))


@pytest.mark.slow
def test_the_successors_of_killed_torch_workers_draw_the_same_tokens(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    """Killed in the middle of a batch, wherever it was, and its successor before it settles."""
    config: dict[str, Any] = {
        "model": str(make("llama", tmp_path / "llama").folder),
        "dtype": "float32",
        "kv_memory": "4MiB",
    }
    times = {"lease_seconds": 30, "threads": 1}
    with proxied(valkey_url) as proxy, worker(proxy.url, tmp_path, engine="torch", **config, **times) as process:
        jobs = [put_wire(valkey, wire(n)) for n in range(JOBS)]
        eventually(lambda: all(tokens(job) > 3 for job in jobs), "tokens", process.log)
        rule = proxy.before("settle", kill)
        assert len(kill_holders(valkey, seed=4, times=1, pause_seconds=0.01)) == 1
        ends = {await_end(job, process.log, seconds=120) for job in jobs}
        attempts = [attempt(job) for job in jobs]
        answers = [[choice["token_ids"] for choice in whole(job)["choices"]] for job in jobs]

    requests = [Request.from_wire(wire(n), kind=Kind.GENERATE) for n in range(JOBS)]
    undisturbed = Engine.load(EngineConfig(**config, threads=1)).generate(requests)
    assert ends == {"finished"}
    assert rule.happened.is_set()
    assert max(attempts) == 3
    assert answers == [[list(choice.token_ids) for choice in result.choices] for result in undisturbed]
    assert audit(valkey) == []
