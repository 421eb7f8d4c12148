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
from worker.pulse import Listener, Pulse
from worker.stop import Stop


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, action in before.items():
        signal.signal(number, action)


def config(shell: str, folder: Path, **changes: float) -> ParentConfig:
    """A process that appends its name to the file ``names`` and does what ``shell`` says; ``sign`` gives a sign."""
    sign = "sign() { printf '\\0' > /proc/self/fd/$0; }"
    command = ["/bin/sh", "-c", f"echo $HEADRACE_WORKER_NAME >> {folder}/names; {sign}; {shell}"]
    return ParentConfig(
        command=command, environment={}, name="w", first_pause_seconds=0.01, poll_seconds=0.05, **changes
    )


def names(folder: Path) -> list[str]:
    return (folder / "names").read_text().split()


class Leases:
    """Who lost one, and why."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.hows: list[str] = []

    def expire(self, name: str, how: str) -> None:
        self.names.append(name)
        self.hows.append(how)


@pytest.fixture
def leases() -> Leases:
    return Leases()


def test_a_dead_process_loses_its_lease_and_has_a_successor_of_another_name(tmp_path: Path, leases: Leases) -> None:
    shell = f"[ $(wc -l < {tmp_path}/names) -gt 2 ] || kill -9 $$; exit 0"

    assert Parent(config(shell, tmp_path), leases.expire).run() == CLEAN
    started = names(tmp_path)
    assert len(set(started)) == 3
    assert leases.names == started[:2]
    assert leases.hows == ["signal SIGKILL"] * 2


def test_a_process_says_itself_why_it_ends(tmp_path: Path, leases: Leases) -> None:
    says = "sign; printf 'RuntimeError\n' > /proc/self/fd/$0; exit 1"
    shell = f"[ $(wc -l < {tmp_path}/names) -gt 1 ] && exit 0; {says}"

    assert Parent(config(shell, tmp_path), leases.expire).run() == CLEAN
    assert leases.hows == ["exit code 1: RuntimeError"]


# -- a process that hangs


def test_a_process_that_falls_silent_is_killed_and_has_a_successor(tmp_path: Path, leases: Leases) -> None:
    shell = f"[ $(wc -l < {tmp_path}/names) -gt 1 ] && exit 0; sign; exec sleep 60"

    assert Parent(config(shell, tmp_path, stall_seconds=0.3), leases.expire).run() == CLEAN
    assert leases.names == names(tmp_path)[:1]
    assert leases.hows == ["no sign of life for 0.3 s"]


@pytest.mark.parametrize(
    ("shell", "stall_seconds"),
    [
        ("sleep 1", 0.3),  # loading a model
        ("sign; sleep 1", 0),
        ("for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18; do sign; sleep 0.1; done", 1.2),
    ],
)
def test_a_process_is_left_alone(tmp_path: Path, leases: Leases, shell: str, stall_seconds: float) -> None:
    """Before its first sign, where nobody is to watch, and as long as it gives signs."""
    assert Parent(config(shell, tmp_path, stall_seconds=stall_seconds), leases.expire).run() == CLEAN
    assert leases.names == []


def test_a_process_that_hangs_while_it_drains_is_killed_before_its_time_is_over(tmp_path: Path, leases: Leases) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    stuck = config("trap '' TERM; sign; exec sleep 60", tmp_path, stop_seconds=50, stall_seconds=0.6)

    assert Parent(stuck, leases.expire).run() == CRASHED
    assert leases.hows == ["no sign of life for 0.6 s"]


def test_silence_is_counted_in_the_parents_own_polls() -> None:
    """A parent that was stopped for an hour finds the signs of that hour in the pipe, or misses one poll."""
    listener = Listener(stall_seconds=1, poll_seconds=0.25)
    pulse = Pulse(listener.writer)
    silent_before = [listener.stalls() for _ in range(20)]
    pulse.beat()
    judged = [listener.stalls() for _ in range(6)]
    os.write(listener.writer, b"\0")
    judged += [listener.stalls()]
    listener.close_writer()
    listener.close()

    assert not any(silent_before)
    assert judged == [False] * 5 + [True, False]


def test_a_pipe_that_nobody_reads_or_that_is_broken_never_blocks_the_loop() -> None:
    now = [0.0]
    listener = Listener(stall_seconds=1, poll_seconds=0.25)
    pulse = Pulse(listener.writer, clock=lambda: now[0])
    for _ in range(100_000):
        pulse.beat()
        now[0] += 1.0
    listener.close()
    pulse.beat()
    pulse.say("gone")
    listener.close_writer()


def test_signs_are_rare() -> None:
    now = [0.0]
    listener = Listener(stall_seconds=1, poll_seconds=0.25)
    pulse = Pulse(listener.writer, clock=lambda: now[0])
    for _ in range(1_000):
        pulse.beat()
        now[0] += 0.001
    listener.close_writer()
    written = os.read(listener._reader, 1_000)
    listener.close()

    assert written == b"\0" * 4


# -- being stopped


def test_a_configuration_that_can_never_run_is_not_tried_again(tmp_path: Path) -> None:
    assert Parent(config("exit 2", tmp_path), lambda name, how: None).run() == PERMANENT
    assert len(names(tmp_path)) == 1


def test_a_lease_is_expired_later_when_redis_is_away_at_first(tmp_path: Path, leases: Leases) -> None:
    outage = iter([True, True, False])

    def expire(name: str, how: str) -> None:
        if next(outage):
            raise StoreUnavailable("gone")
        leases.expire(name, how)

    shell = f"[ $(wc -l < {tmp_path}/names) -gt 1 ] || exit 1; sleep 0.5"

    assert Parent(config(shell, tmp_path), expire).run() == CLEAN
    assert leases.names == names(tmp_path)[:1]


@pytest.mark.parametrize(
    ("shell", "code"), [("trap 'exit 0' TERM", CLEAN), ("trap 'exit 1' TERM", CRASHED), (":", CLEAN)]
)
def test_a_signal_reaches_the_process_and_nothing_is_started_again(tmp_path: Path, shell: str, code: int) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    assert Parent(config(f"{shell}; while :; do sleep 0.05; done", tmp_path), lambda name, how: None).run() == code
    assert len(names(tmp_path)) == 1


def test_a_process_that_does_not_stop_is_killed_and_its_lease_expired(tmp_path: Path, leases: Leases) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    stuck = config("trap '' TERM; while :; do sleep 0.05; done", tmp_path, stop_seconds=0.2)

    assert Parent(stuck, leases.expire).run() == CRASHED
    assert leases.names == names(tmp_path)
    assert leases.hows == ["still there 0.2 s after it was told to stop"]


def test_pauses_double_with_each_crash_and_are_short_again_after_a_good_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "headrace.worker.parent")
    shell = f"n=$(wc -l < {tmp_path}/names); [ $n -eq 4 ] && sleep 0.8; [ $n -eq 6 ] && exit 0; exit 1"

    Parent(config(shell, tmp_path, ran_well_seconds=0.7), lambda name, how: None).run()

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
