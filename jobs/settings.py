"""What the store can be told, checked once; and how every room reads its settings from ``HEADRACE_<NAME>``."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PREFIX = "HEADRACE_"

#: Variables that others set too, and the field each one fills where ``HEADRACE_<NAME>`` is absent.
BORROWED: Mapping[str, str] = {"redis_url": "REDIS_URL", "hf_token": "HF_TOKEN"}

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


DURABILITIES = ("replica", "fsync", "memory")  #: a 202 means on two disks, on one, or in memory
LEAST: Mapping[str, float] = {
    "lease_seconds": 0.05,
    "grace_seconds": 0,
    "max_queued": 1,
    "resume_wait_seconds": 0,
    "result_ttl_seconds": 1,
}


class SettingError(ValueError):
    """A variable holds what it cannot hold; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Where the jobs live, and for how long.

    Raises:
        ValueError: naming the field and the value.
    """

    redis_url: str = ""  #: redis://, rediss:// or unix://, with a password in it where one is needed
    durability: str = "fsync"  #: what a submission's answer means: one of DURABILITIES
    lease_seconds: float = 10.0  #: a worker silent for so long is taken for dead
    grace_seconds: float = 8.0  #: … and its jobs go to others after so long again
    max_queued: int = 2_000_000
    resume_wait_seconds: float = 3_600.0  #: for a worker that computes as the one did that began an answer
    result_ttl_seconds: int = 86_400  #: of jobs that stock RQ put in without saying

    def __post_init__(self) -> None:
        if self.durability not in DURABILITIES:
            raise ValueError(f"durability: must be one of {', '.join(DURABILITIES)}, not {self.durability!r}")
        for name, low in LEAST.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}: must be at least {low:g}, not {getattr(self, name)!r}")


def from_environ(cls: type[T], environ: Mapping[str, str]) -> T:
    """Read a room's settings: field ``foo_bar`` from ``HEADRACE_FOO_BAR``, its default where that is absent or empty.

    Args:
        cls: a dataclass with fields of str, int, float, bool or Path, each perhaps ``| None``.

    Raises:
        SettingError: naming the variable, and what it must be.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        variable = PREFIX + field.name.upper()
        text = environ.get(variable, "")
        if not text and field.name in BORROWED:
            variable, text = BORROWED[field.name], environ.get(BORROWED[field.name], "")
        if text:
            values[field.name] = _parse(variable, text, hints[field.name])
    try:
        return cls(**values)
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(_with_variable(str(error), values)) from error


def _with_variable(problem: str, values: Mapping[str, Any]) -> str:
    """The problem that a settings class named by field, named by variable."""
    name = problem.split(":")[0].split(" ")[0]
    return problem.replace(name, PREFIX + name.upper(), 1) if name in values else problem


def _parse(variable: str, text: str, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        [hint] = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if hint is bool:
        if text.lower() not in TRUE + FALSE:
            raise SettingError(f"{variable}: must be true or false, not {text!r}")
        return text.lower() in TRUE
    if hint is Path:
        return Path(text).expanduser()
    if hint not in (int, float):
        return text
    try:
        return hint(text)
    except ValueError:
        raise SettingError(f"{variable}: must be {WORDS[hint]}, not {text!r}") from None


WORDS: Mapping[type, str] = {int: "a whole number", float: "a number"}
