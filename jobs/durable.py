"""A 202 means on disk: the command that waits for it, and how its answer reads. Knows no job."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import NotDurable

WAIT_SECONDS = 2.0
#: Waits until the append-only file has this connection's writes. A time-out answers [0, 0] and raises nothing.
WAIT_FOR_DISK = ("WAITAOF", 1, 0, round(WAIT_SECONDS * 1000))


def check_on_disk(answer: Sequence[int]) -> None:
    """Raise NotDurable unless the server's own disk has it."""
    if answer[0] < 1:
        raise NotDurable(WAIT_SECONDS)
