"""``headrace doctor``: which Redis it looks at, and what it passes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from headrace import rooms
from headrace.cli import main
from headrace.embedded import DataFolder

FAKE = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('HEADRACE_REDIS_URL')])); sys.exit({code})"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a settings file, and no address in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("REDIS_URL", "HEADRACE_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)


def fake(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A doctor who says what he was told, and leaves with ``code``."""

    def command(module: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-c", FAKE.replace("{code}", str(code)), module, *arguments)

    monkeypatch.setattr(rooms, "command", command)


@pytest.mark.parametrize(
    ("flags", "passed", "code"),
    [
        ([], [], 0),
        (["--fix"], ["--fix"], 1),
        (["--json"], ["--json"], 3),
        (["--json", "--fix"], ["--fix", "--json"], 0),
    ],
)
def test_flags_and_exit_code_are_passed_on(
    flags: list[str], passed: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, code)
    left = main(["doctor", "--redis-url", "redis://127.0.0.1:1", *flags])

    assert left == code
    assert json.loads(capfd.readouterr().out) == [["jobs", "doctor", *passed], "redis://127.0.0.1:1"]


def test_without_an_address_it_looks_at_the_queue_of_up_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, 0)
    folder = DataFolder.open(tmp_path / "queue")
    left = main(["doctor", "--data-dir", str(tmp_path / "queue")])
    shown = capfd.readouterr()
    folder.close()

    assert left == 0
    assert json.loads(shown.out)[1] == folder.url
    assert str(tmp_path / "queue") in shown.err
    assert folder.password not in shown.err


def test_without_any_redis_it_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, 0)

    assert main(["doctor", "--data-dir", str(tmp_path / "nothing")]) == 2
    assert "REDIS_URL" in capfd.readouterr().err


def test_a_doctor_who_is_killed_is_no_healthy_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "command", lambda *_: (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))

    assert main(["doctor", "--redis-url", "redis://127.0.0.1:1"]) == 137
