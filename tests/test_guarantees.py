"""``docs/guarantees.md`` names tests that there are, and every fault test is named there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


def names_in(pattern: str) -> set[str]:
    """The names of the test functions in these files."""
    files = (ROOT / "tests").glob(pattern)
    return {name for path in files for name in re.findall(r"^def (test_\w+)\(", path.read_text("utf-8"), re.MULTILINE)}


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))

    assert len(named) > 30
    assert named - names_in("test_*.py") == set()


def test_every_fault_test_is_a_row_of_the_page() -> None:
    named = re.findall(r"^\|.*`(test_\w+)` \|$", PAGE, re.MULTILINE)

    assert names_in("test_faults_*.py") - set(named) == set()
