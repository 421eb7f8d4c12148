"""What the parent of an engine process promises; the process is a few lines of shell here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import StoreUnavailable
from worker.parent import CLEAN, CRASHED, PERMANENT, Parent, ParentConfig
from worker.stop import Stop


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, action in before.items():
        signal.signal(number, action)


def config(shell: str, folder: Path, **changes: float) -> ParentConfig:
    """A process that appends its name to the file ``names`` and does what ``shell`` says."""
    command = ["/bin/sh", "-c", f"echo $HEADRACE_WORKER_NAME >> {folder}/names; {shell}"]
    return ParentConfig(
        command=command, environment={}, name="w", first_pause_seconds=0.01, poll_seconds=0.05, **changes
    )


def names(folder: Path) -> list[str]:
    return (folder / "names").read_text().split()


def test_a_dead_process_loses_its_lease_and_has_a_successor_of_another_name(tmp_path: Path) -> None:
    expired: list[str] = []
    shell = f"[ $(wc -l < {tmp_path}/names) -gt 2 ] || kill -9 $$; exit 0"

    assert Parent(config(shell, tmp_path), expired.append).run() == CLEAN
    started = names(tmp_path)
    assert len(set(started)) == 3
    assert expired == started[:2]


def test_a_configuration_that_can_never_run_is_not_tried_again(tmp_path: Path) -> None:
    assert Parent(config("exit 2", tmp_path), lambda name: None).run() == PERMANENT
    assert len(names(tmp_path)) == 1


def test_a_lease_is_expired_later_when_redis_is_away_at_first(tmp_path: Path) -> None:
    expired: list[str] = []
    outage = iter([True, True, False])

    def expire(name: str) -> None:
        if next(outage):
            raise StoreUnavailable("gone")
        expired.append(name)

    shell = f"[ $(wc -l < {tmp_path}/names) -gt 1 ] || exit 1; sleep 0.5"

    assert Parent(config(shell, tmp_path), expire).run() == CLEAN
    assert expired == names(tmp_path)[:1]


@pytest.mark.parametrize(
    ("shell", "code"), [("trap 'exit 0' TERM", CLEAN), ("trap 'exit 1' TERM", CRASHED), (":", CLEAN)]
)
def test_a_signal_reaches_the_process_and_nothing_is_started_again(tmp_path: Path, shell: str, code: int) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    assert Parent(config(f"{shell}; while :; do sleep 0.05; done", tmp_path), lambda name: None).run() == code
    assert len(names(tmp_path)) == 1


def test_a_process_that_does_not_stop_is_killed_and_its_lease_expired(tmp_path: Path) -> None:
    expired: list[str] = []
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    stuck = config("trap '' TERM; while :; do sleep 0.05; done", tmp_path, stop_seconds=0.2)

    assert Parent(stuck, expired.append).run() == CRASHED
    assert expired == names(tmp_path)


def test_pauses_double_with_each_crash_and_are_short_again_after_a_good_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "headrace.worker.parent")
    shell = f"n=$(wc -l < {tmp_path}/names); [ $n -eq 4 ] && sleep 0.8; [ $n -eq 6 ] && exit 0; exit 1"

    Parent(config(shell, tmp_path, ran_well_seconds=0.7), lambda name: None).run()

    pauses = [
        record.args[0] for record in caplog.records if isinstance(record.args, tuple) and "starts in" in record.msg
    ]
    assert pauses == [0.01, 0.02, 0.04, 0.01, 0.02]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    child = "import os; from worker.parent import die_with; die_with(os.getppid()); print(os.getpid(), flush=True)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{child}; import time; time.sleep(60)'])"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())

    parent.kill()
    parent.wait(5)

    assert parent.stdout.read() == b""  # the last writer is gone
    parent.stdout.close()
    assert not Path(f"/proc/{pid}/fd/1").exists()


def test_the_first_request_drains_and_the_second_leaves_at_once() -> None:
    now = [0.0]
    stop = Stop(drain_seconds=10, clock=lambda: now[0])

    stop.request()
    now[0] = 0.1
    stop.request()  # the same signal, sent to the whole group
    assert (stop.requested, stop.overdue) == (True, False)

    now[0] = 1.0
    stop.request()
    assert stop.overdue


def test_draining_ends_after_its_time() -> None:
    now = [0.0]
    stop = Stop(drain_seconds=10, clock=lambda: now[0])
    stop.request()
    now[0] = 10.0

    assert stop.overdue
