"""Keeps one engine process running: starts it, sees it die or hang, gives its jobs back at once, starts the next.

The engine process may die of anything: the kernel's OOM killer, a CUDA fault, a poison job; or it never comes out of a
step. This process is small enough not to die with it, and knows the name under which it held its lease. No torch.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from core.errors import StoreError
from worker.pulse import Listener

log = logging.getLogger("headrace.worker.parent")

CLEAN = 0  #: the engine process drained, or was stopped before it had claimed anything
CRASHED = 1
PERMANENT = 2  #: exit code of an engine process that can never run with this configuration

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentConfig:
    """What is started, and how patiently."""

    command: Sequence[str]  #: the engine process; the number of its end of the pipe is added
    environment: Mapping[str, str]
    name: str = ""  #: of the worker; the processes are called after it
    stop_seconds: float = 28.0  #: after a signal: a process that has not ended by then is killed
    stall_seconds: float = 120.0  #: without a sign of life: then it is killed; 0: it may be silent for ever
    first_pause_seconds: float = 0.1  #: before a restart; doubles with each crash in a row
    longest_pause_seconds: float = 5.0
    ran_well_seconds: float = 5.0  #: a process that ran so long makes the next pause the first again
    poll_seconds: float = 1.0


class Parent:
    """One worker, as seen by whoever started it: runs until it is told to stop, whatever happens to its engine."""

    def __init__(self, config: ParentConfig, expire_lease: Callable[[str, str], object]) -> None:
        """Take ``expire_lease``: it gives the jobs of a worker back that died in this way, or raises a StoreError."""
        self._config = config
        self._expire_lease = expire_lease
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped_at: float | None = None  #: of the first signal, on the monotonic clock
        self._dead: list[tuple[str, str]] = []  #: whose leases are not expired yet, and how they died
        self._crashes = 0  #: in a row

    def run(self) -> int:
        """Start engine processes, one after another; the exit code for our own process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        while self._stopped_at is None:
            name, started = self._next_name(), time.monotonic()
            code, how = self._watch(name)
            if code in (CLEAN, PERMANENT):
                return code
            log.error("engine process of %s died: %s", name, how)
            self._dead.append((name, how))
            self._bury()
            if self._stopped_at is not None:
                return CRASHED
            ran_well = time.monotonic() - started >= self._config.ran_well_seconds
            self._crashes = 1 if ran_well else self._crashes + 1
            self._pause()
        return CLEAN

    def _watch(self, name: str) -> tuple[int, str]:
        """Start a process and wait for its end: its exit code (negative: a signal), and how it ended, in words."""
        listener = Listener(self._config.stall_seconds, self._config.poll_seconds)
        self._process = process = self._start(name, listener)
        fault = ""
        try:
            while (code := self._wait(process)) is None:
                self._bury()
                if not fault and (fault := self._find_fault(listener)):
                    log.error("killing the engine process of %s: %s", name, fault)
                    process.kill()
            if code == -signal.SIGTERM and self._stopped_at is not None:
                code = CLEAN
            return code, fault or describe_exit(code, listener.last_words())
        finally:
            listener.close()

    def _start(self, name: str, listener: Listener) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in a terminal reaches us only, and is forwarded once.
        process = subprocess.Popen(
            [*self._config.command, str(listener.writer)],
            env={**self._config.environment, "HEADRACE_WORKER_NAME": name},
            pass_fds=(listener.writer,),
            start_new_session=True,
        )
        listener.close_writer()
        if self._stopped_at is not None:
            process.terminate()
        return process

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit code, or None after a poll's time."""
        if hasattr(os, "pidfd_open"):  # Linux; subprocess looks twenty times a second
            ending = os.pidfd_open(process.pid)
            try:
                select.select([ending], [], [], self._config.poll_seconds)
            finally:
                os.close(ending)
            return process.poll()
        try:
            return process.wait(self._config.poll_seconds)
        except subprocess.TimeoutExpired:
            return None

    def _find_fault(self, listener: Listener) -> str:
        """Why the process has to be killed, its lease to be expired here and now; empty when it need not."""
        config = self._config
        if listener.stalls():
            return f"no sign of life for {config.stall_seconds:g} s"
        if self._stopped_at is not None and time.monotonic() > self._stopped_at + config.stop_seconds:
            return f"still there {config.stop_seconds:g} s after it was told to stop"
        return ""

    def _forward(self, number: int, frame: object) -> None:
        """Pass a signal on, as SIGTERM: the first drains the engine process, the second hands its jobs back at once."""
        self._stopped_at = self._stopped_at or time.monotonic()
        if self._process is not None:
            self._process.terminate()

    def _bury(self) -> None:
        """Expire the leases of dead processes; what Redis does not take now is tried again at the next poll."""
        while self._dead:
            try:
                self._expire_lease(*self._dead[0])
            except StoreError as error:
                log.warning("the lease of %s is not expired yet: %s", self._dead[0][0], error)
                return
            del self._dead[0]

    def _pause(self) -> None:
        seconds = min(self._config.longest_pause_seconds, self._config.first_pause_seconds * 2 ** (self._crashes - 1))
        log.info("the next engine process starts in %.1f s", seconds)
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._stopped_at is None:
            time.sleep(0.02)

    def _next_name(self) -> str:
        """Never the same twice: RQ takes a name that died without saying so for alive."""
        return f"{self._config.name or f'{socket.gethostname()}-{os.getpid()}'}-{secrets.token_hex(3)}"


def describe_exit(code: int, last_words: str = "") -> str:
    """An exit code in words, and what the process said itself."""
    text = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{text}: {last_words}" if last_words else text


def die_with(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies (Linux): a killed parent leaves no orphan, and no job is lost."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
