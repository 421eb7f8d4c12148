"""The real engine under a worker: a killed process's successor goes on to the very tokens of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.engine import Engine, EngineConfig
from core.request import Kind, Request
from jobs.settings import SettingError
from tests.tiny_models import VOCAB, make
from tests.worker_world import await_end, eventually, put_wire, tokens, worker
from worker.engine_process import load
from worker.settings import WorkerSettings

JOBS = 16


def wire(n: int) -> dict[str, Any]:
    """A job of 100 tokens a choice: greedy, or drawn with a seed."""
    params = {"max_tokens": 100, "n": 1 + n % 3, "ignore_eos": True, "temperature": (n % 2) * 0.9, "seed": n}
    return {"input": {"prompt_token_ids": [(7 * n + k) % VOCAB for k in range(1 + n)]}, "params": params}


@pytest.mark.slow
def test_a_killed_torch_workers_successor_draws_the_same_tokens(valkey_url: str, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "llama").folder
    config = {"model": str(folder), "dtype": "float32", "kv_memory": "4MiB", "threads": 1}
    with worker(valkey_url, tmp_path, engine="torch", lease_seconds=30, **config) as process:
        jobs = [put_wire(process.client, wire(n)) for n in range(JOBS)]
        eventually(lambda: all(tokens(job) > 3 for job in jobs), "tokens", process.log)
        process.kill_engine()
        kept = [tokens(job) for job in jobs]
        ends = {await_end(job, process.log, seconds=90) for job in jobs}
        attempts = {int(process.client.hget(f"rq:job:{job.id}", "attempt")) for job in jobs}
        answers = [[choice["token_ids"] for choice in job.return_value()["choices"]] for job in jobs]

    requests = [Request.from_wire(wire(n), kind=Kind.GENERATE) for n in range(JOBS)]
    undisturbed = Engine.load(EngineConfig(**config)).generate(requests)  # type: ignore[arg-type]
    assert ends == {"finished"}
    assert attempts == {2}
    assert all(3 < count < 100 * (1 + n % 3) for n, count in enumerate(kept))
    assert answers == [[list(choice.token_ids) for choice in result.choices] for result in undisturbed]


@pytest.mark.parametrize("settings", [{"device": "cuda"}, {"kv_memory": "much"}])
def test_an_engine_that_can_never_be_made_here_is_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    with pytest.raises(SettingError, match=r"cuda|kv_memory|size"):
        load(WorkerSettings(**settings), threads=1)  # type: ignore[arg-type]


def test_worker_i_takes_card_i_mod_n(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EngineConfig] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("core.engine.Engine.load", asked.append)
    for index in range(3):
        load(WorkerSettings(worker_index=index), threads=3)
    load(WorkerSettings(worker_index=1, device="cpu"), threads=3)

    assert [config.device for config in asked] == ["cuda:0", "cuda:1", "cuda:0", "cpu"]
    assert {config.threads for config in asked} == {3}
