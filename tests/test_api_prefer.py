"""The ``Prefer`` header."""

from __future__ import annotations

import pytest

from api.prefer import Preference, read_prefer


@pytest.mark.parametrize(
    ("header", "seconds", "applied"),
    [
        ("", 0, ""),
        ("wait=7", 7, "wait=7"),
        ('Wait = "7"', 7, "wait=7"),
        ("respond-async, wait=7", 7, "wait=7"),
        ("respond-async", 0, "respond-async"),
        ("wait=9999999999999999999999", 60, "wait=60"),
        ("wait=3, wait=9", 3, "wait=3"),
        ("wait=5; foo=bar", 5, "wait=5"),
        ("wait=-1", 0, ""),
        ("wait=²", 0, ""),
        ("handling=lenient", 0, ""),
    ],
)
def test_a_preference_is_honoured_or_ignored_and_never_refused(header: str, seconds: float, applied: str) -> None:
    assert read_prefer(header, 60.0) == Preference(wait_seconds=seconds, applied=applied)
