"""The side-by-side run of peers: what a peer is told and answers, perplexity, turns, the report. No real peer."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import stdio
from benchmarks.peers.measure import Outcome, Turn, measure
from benchmarks.peers.report import figures, page
from benchmarks.peers.seat import Ended, Seat
from benchmarks.peers.systems import SYSTEMS

#: A peer that answers with its prompt's last token, and counts in the time it is given.
FAKE = """
import sys
from pathlib import Path
from benchmarks.peers import stdio

class Fake:
    versions, settings = {"fake": "1"}, {"weights": "none", "cache": "none", "options": "none"}

    def run(self, items):
        print("noise on standard output")
        return [[item.token_ids[-1]] * item.answer_tokens for item in items]

    def perplexity(self, prose):
        if len(prose.windows) != 1:
            raise stdio.CannotScore("one window only")
        return stdio.perplexity_of([[-1.0] * (len(prose.windows[0]) - 1)])

stdio.serve(Fake, Path(sys.argv[1]))
"""
FACTS = {
    "machine": "a machine",
    "date": "2026-11-25",
    "command": "a command",
    "items": 2,
    "prompt_tokens": 5,
    "answer_tokens": 5,
    "running": 32,
}


def write_workload(folder: Path, windows: int = 1) -> Path:
    items = [{"token_ids": [1, 2], "answer_tokens": 3}, {"token_ids": [4, 5, 6], "answer_tokens": 2}]
    path = folder / "workload.json"
    path.write_text(json.dumps({"items": items, "text": "t", "windows": [[1, 2, 3, 4]] * windows}))
    return path


@pytest.fixture
def seat(tmp_path: Path) -> Iterator[Seat]:
    one = Seat([sys.executable, "-c", FAKE, str(write_workload(tmp_path))], tmp_path / "log")
    yield one
    one.close()


def outcome(*rates: float, answers: list[list[int]] | None = None, **rest: Any) -> Outcome:
    turns = [
        Turn(seconds=1.0, tokens=round(rate), idle_cores=0.01, foreign_cores=0.02, answers=answers or [[1], [2]])
        for rate in rates
    ]
    facts = {"versions": {"x": "1"}, "settings": {"weights": "bfloat16", "cache": "8 bits", "options": "as it comes"}}
    return Outcome(facts=facts, turns=turns, **rest)


def test_a_peer_says_what_it_is_and_runs_what_it_is_told_whatever_its_libraries_print(seat: Seat) -> None:
    seat.await_ready()
    one, both = seat.ask("run 1"), seat.ask("run 2")

    assert seat.facts["versions"] == {"fake": "1"}
    assert (one["answers"], both["answers"]) == ([[2, 2, 2]], [[2, 2, 2], [6, 6]])
    assert both["seconds"] >= 0
    assert seat.ask("perplexity")["perplexity"] == pytest.approx(math.e)
    assert seat.cpu_seconds() > 0


def test_a_peer_that_has_ended_is_told_apart_from_one_that_answers(tmp_path: Path) -> None:
    one = Seat([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")

    with pytest.raises(Ended):
        one.await_ready()
    one.close()


def test_a_peer_that_cannot_score_says_why(tmp_path: Path) -> None:
    one = Seat([sys.executable, "-c", FAKE, str(write_workload(tmp_path, windows=2))], tmp_path / "log")
    one.await_ready()

    assert one.ask("perplexity") == {"cannot": "one window only"}
    one.close()


def test_perplexity_counts_only_what_has_half_a_window_before_it() -> None:
    window = [-9.0] * 256 + [-2.0] * 255  # 512 tokens, the first of which has no probability

    assert stdio.perplexity_of([window]) == pytest.approx(math.exp(2.0))
    assert stdio.perplexity_of([window, [-9.0] * 256 + [-4.0] * 255]) == pytest.approx(math.exp(3.0))


def test_systems_take_turns(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.measure.SETTLE_SECONDS", 0.0)
    seat.await_ready()
    outcomes = measure({"engine": seat}, items=2, repeats=2, attempts=1)

    assert [turn.tokens for turn in outcomes["engine"].turns] == [5, 5]
    assert outcomes["engine"].perplexity == pytest.approx(math.e)


def test_the_report_has_medians_ratios_of_rounds_and_what_did_not_run() -> None:
    outcomes = {
        "engine": outcome(100, 200, 150, cannot="no such task"),
        "openvino": outcome(200, 300, 600, answers=[[1], [3]], perplexity=32.5),
    }
    text = page(outcomes, {"vllm": "python is not there"}, FACTS)
    rows = [line for line in text.splitlines() if line.startswith("| ")]

    assert (
        "| OpenVINO GenAI, continuous batching | bfloat16 | 8 bits | 300.0 | 200 … 600 | 2.00 | 1 of 2 | 32.500 |"
        in rows
    )
    assert "| Headrace, bare engine | bfloat16 | 8 bits | 150.0 | 100 … 200 | 1.00 | 2 of 2 | - |" in rows
    assert rows.index(next(row for row in rows if "OpenVINO" in row)) < rows.index(rows[-1])
    assert "* vLLM, CPU build: **not run**: python is not there" in text
    assert "None for Headrace, bare engine: no such task." in text
    assert figures(outcomes)["openvino"]["median"] == 300


def test_every_system_of_the_table_has_its_program() -> None:
    folder = Path(stdio.__file__).parent

    assert [system.module for system in SYSTEMS.values() if not (folder / f"{system.module}.py").is_file()] == []
