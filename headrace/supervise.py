"""One process kept running: started, its lines passed on, started again when it dies, stopped when asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from headrace.rooms import BAD_CONFIGURATION, tethered

LINE_LIMIT = 1 << 20  #: bytes; a longer line of a room's log is passed on in pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A process that is wanted for as long as we run."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    standard_input: bytes = b""
    files: tuple[int, ...] = ()  #: descriptors it inherits
    death_signal: str = "KILL"  #: what the kernel sends it when we are killed
    first_wait_seconds: float = 0.5  #: before it is started again; doubles up to ``longest_wait_seconds``
    longest_wait_seconds: float = 15.0
    settled_seconds: float = 30.0  #: having run so long, the next wait is the first again


class PermanentFailure(Exception):
    """A process says that it can never work with this configuration."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} cannot work with these settings (exit code {code}); its last lines say why")
        self.name = name
        self.code = code


class Child:
    """Keeps one role's process running; each process is a session of its own, so a terminal's Ctrl-C passes it by."""

    def __init__(self, role: Role, log: Callable[[str, str], None]) -> None:
        self.role = role
        self._log = log
        self._stopping = False
        self._process: asyncio.subprocess.Process | None = None
        self._ended = asyncio.Event()
        self._wake = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def keep(self) -> None:
        """Run it until ``stop``.

        Raises:
            PermanentFailure: it ended with the exit code for a bad configuration.
        """
        wait = self.role.first_wait_seconds
        try:
            while not self._stopping:
                started = time.monotonic()
                code = await self._run_once()
                if self._stopping:
                    return
                if code == BAD_CONFIGURATION:
                    raise PermanentFailure(self.role.name, code)
                if time.monotonic() - started > self.role.settled_seconds:
                    wait = self.role.first_wait_seconds
                self._log("headrace", f"{self.role.name} ended with {_words(code)}; it starts again in {wait:g} s")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait)
                wait = min(2 * wait, self.role.longest_wait_seconds)
        finally:
            self._ended.set()

    def send(self, number: signal.Signals) -> None:
        """Signal the process, when there is one."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, patience_seconds: float) -> bool:
        """Ask it to end, wait, and kill what is left. True: it ended by itself in time. Safe to call twice."""
        self._stopping = True
        self._wake.set()
        self.send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._ended.wait(), patience_seconds)
        except TimeoutError:
            self._log("headrace", f"{self.role.name} did not stop within {patience_seconds:g} s and is killed")
            self.kill()
            await self._ended.wait()
            return False
        return True

    def kill(self) -> None:
        """End the process and whatever it started, at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _run_once(self) -> int:
        """Start the process and see its end.

        Its output has a pipe of our own: asyncio's would let us wait for whoever else holds the other end, an engine
        that outlives its parent for instance.
        """
        ours, theirs = os.pipe()
        try:
            process = self._process = await asyncio.create_subprocess_exec(
                *tethered(self.role.command, self.role.death_signal),
                stdin=asyncio.subprocess.PIPE if self.role.standard_input else asyncio.subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                env=dict(self.role.environment),
                start_new_session=True,
                pass_fds=self.role.files,
            )
        finally:
            os.close(theirs)
        if self._stopping:
            self.send(signal.SIGTERM)  # ``stop`` came while it was being started
        async with _lines(ours) as stream:
            passing = asyncio.create_task(self._pass_on(stream))
            await self._feed(process)
            code = await process.wait()
            self.kill()  # what it left behind: an engine whose parent died would compute for nobody
            await asyncio.wait({passing}, timeout=1)
            passing.cancel()
        return code

    async def _feed(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(self.role.standard_input)
                await process.stdin.drain()
            process.stdin.close()

    async def _pass_on(self, stream: asyncio.StreamReader) -> None:
        while line := await _line(stream):
            self._log(self.role.name, line.decode(errors="replace").rstrip())


@contextlib.asynccontextmanager
async def _lines(descriptor: int) -> AsyncIterator[asyncio.StreamReader]:
    """The reading end of a pipe, as a stream."""
    reader = asyncio.StreamReader(limit=LINE_LIMIT)
    with open(descriptor, "rb", buffering=0) as pipe:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            yield reader
        finally:
            transport.close()
            await asyncio.sleep(0)  # the transport closes the pipe in the loop's next round


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line, or what there is of one that is too long; empty at the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.read(max(1, error.consumed))


def _words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
