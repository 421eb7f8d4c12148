"""A 202 means on disk: the command that waits for it, and how its answer reads. Knows no job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.errors import NotDurable

WAIT_SECONDS = 2.0
_MILLISECONDS = round(WAIT_SECONDS * 1000)

#: By durability, what waits until the append-only files of the server and of so many replicas have this connection's
#: writes. A time-out answers with smaller numbers than were asked for, and raises nothing.
WAITS: Mapping[str, tuple[str | int, ...]] = {
    "memory": (),
    "fsync": ("WAITAOF", 1, 0, _MILLISECONDS),
    "replica": ("WAITAOF", 1, 1, _MILLISECONDS),
}


def check_on_disk(wait: Sequence[str | int], answer: Sequence[int]) -> None:
    """Raise NotDurable unless as many disks have it as ``wait``, one of WAITS, asked for."""
    _, local, replicas, _ = wait
    if answer[0] < int(local) or answer[1] < int(replicas):
        raise NotDurable(WAIT_SECONDS)
