"""How a worker makes the real engine. What happens when it is killed: ``test_faults_torch.py``."""

from __future__ import annotations

import pytest

from core.engine import EngineConfig
from jobs.settings import SettingError
from worker.engine_process import load
from worker.settings import WorkerSettings


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
