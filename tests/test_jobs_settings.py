"""How rooms read their settings from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.settings import SettingError, StoreSettings, from_environ


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    text: str = "t"
    number: int = 1
    seconds: float = 1.5
    flag: bool = False
    folder: Path = Path("here")
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"number: must be at least 0, not {self.number}")


def test_what_is_absent_or_empty_has_its_default() -> None:
    assert from_environ(Example, {"HEADRACE_NUMBER": "", "OTHER": "x"}) == Example()


def test_each_type_is_read() -> None:
    found = from_environ(
        Example,
        {
            "HEADRACE_TEXT": " as it is ",
            "HEADRACE_NUMBER": "7",
            "HEADRACE_SECONDS": "0.25",
            "HEADRACE_FLAG": "Yes",
            "HEADRACE_FOLDER": "/tmp/x",
            "HEADRACE_LIMIT": "9",
        },
    )

    assert found == Example(text=" as it is ", number=7, seconds=0.25, flag=True, folder=Path("/tmp/x"), limit=9)


@pytest.mark.parametrize(
    ("variable", "text", "wanted"),
    [
        ("HEADRACE_NUMBER", "7.5", "a whole number, not '7.5'"),
        ("HEADRACE_SECONDS", "soon", "a number, not 'soon'"),
        ("HEADRACE_FLAG", "maybe", "true or false, not 'maybe'"),
        ("HEADRACE_NUMBER", "-1", "at least 0, not -1"),
    ],
)
def test_what_cannot_be_is_refused_by_the_variables_name(variable: str, text: str, wanted: str) -> None:
    with pytest.raises(SettingError, match=f"{variable}: must be {wanted}"):
        from_environ(Example, {variable: text})


def test_the_stores_address_may_come_from_redis_url() -> None:
    both = {"REDIS_URL": "redis://theirs", "HEADRACE_REDIS_URL": "redis://ours"}

    assert from_environ(StoreSettings, both).redis_url == "redis://ours"
    assert from_environ(StoreSettings, {"REDIS_URL": "redis://theirs"}).redis_url == "redis://theirs"


@pytest.mark.parametrize(
    ("field", "value"),
    [("durability", "maybe"), ("lease_seconds", 0), ("max_queued", 0), ("grace_seconds", float("nan"))],
)
def test_a_store_setting_out_of_its_bound_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: must be"):
        StoreSettings(**{field: value})  # type: ignore[arg-type]
