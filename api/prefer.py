"""The ``Prefer`` header of RFC 7240, as far as we honour it: ``wait=N`` and ``respond-async``."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEADER_CHARACTERS = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """What the client would like."""

    wait_seconds: float = 0.0  #: hold the answer for so long at most
    applied: str = ""  #: what ``Preference-Applied`` says; empty: nothing was asked that we know


def read_prefer(header: str, max_wait_seconds: float) -> Preference:
    """Read the header; what we do not know or cannot read is ignored, as the RFC wants.

    Args:
        max_wait_seconds: a longer wait is cut to this, and ``applied`` says so.
    """
    wanted: dict[str, str] = {}
    for part in header[:MAX_HEADER_CHARACTERS].split(","):
        name, _, value = part.split(";")[0].partition("=")
        wanted.setdefault(name.strip().lower(), value.strip().strip('"'))  # the first of a repeated name counts
    wait = wanted.get("wait", "")
    if wait.isascii() and wait.isdecimal():
        seconds = min(int(wait[:9]), int(max_wait_seconds))
        return Preference(wait_seconds=seconds, applied=f"wait={seconds}")
    return Preference(applied="respond-async" if "respond-async" in wanted else "")
