"""The sign of life that an engine process gives its parent: bytes through a pipe. Knows no engine and no Redis.

The loop writes them itself, between two steps: a thread would go on while the loop hangs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

from worker.outage import Every

SIGN = b"\0"
SIGN_SECONDS = 0.25  #: at most one sign in so long
MOST_WORDS = 100  #: bytes of last words


class Pulse:
    """The engine process' end. Without a pipe nobody listens, and nothing is written."""

    def __init__(self, pipe: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._pipe = pipe
        self._every = Every(SIGN_SECONDS, clock)

    def beat(self) -> None:
        """Say that the loop goes round, if the last sign is old enough."""
        if self._pipe is not None and self._every.due():
            self._write(SIGN)

    def say(self, last_words: str) -> None:
        """Tell the parent why this process ends."""
        if self._pipe is not None:
            self._write(last_words.encode()[:MOST_WORDS])

    def _write(self, what: bytes) -> None:
        with suppress(OSError):  # the pipe is full, its reader was stopped; or broken, its reader is dead
            os.write(self._pipe or 0, what)


class Listener:
    """The parent's end, for one engine process: watches from the first sign on, however long a model loads."""

    def __init__(self, stall_seconds: float, poll_seconds: float) -> None:
        """Take how long a silence may be; 0: for ever."""
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self.writer, False)
        self._most = stall_seconds / poll_seconds or float("inf")
        self._silent: int | None = None  #: polls since the last sign; None before the first
        self._words = b""

    def stalls(self) -> bool:
        """Whether the process has been silent for too long. To be asked once a poll.

        Silence is counted in our own polls: after we were stopped ourselves, what was written meanwhile is read first,
        and the gap counts for one.
        """
        if self._read():
            self._silent = 0
        elif self._silent is not None:
            self._silent += 1
        return self._silent is not None and self._silent > self._most

    def last_words(self) -> str:
        """What the process said before it ended; empty when it could not."""
        self._read()
        return "".join(each for each in self._words.decode(errors="replace") if each.isprintable())

    def close_writer(self) -> None:
        """Leave the other end to the process."""
        os.close(self.writer)

    def close(self) -> None:
        os.close(self._reader)

    def _read(self) -> bool:
        """Whether there was a sign."""
        found = False
        with suppress(BlockingIOError):
            while got := os.read(self._reader, 65_536):
                found = found or SIGN in got
                self._words = (self._words + got.replace(SIGN, b""))[:MOST_WORDS]
        return found
