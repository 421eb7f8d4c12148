"""Where a setting comes from: flags, then ``HEADRACE_<NAME>``, then ``--config FILE`` or ``./headrace.toml``.

A name nobody knows is an error with a suggestion, in each layer: a typing mistake must not silently be the default.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.settings import BORROWED, PREFIX, ROOM_VARIABLES, RULES, TYPES, SettingError, Settings

FILE = "headrace.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One value as it was given, and where."""

    value: object
    source: str  #: as a person would look for it: ``--port``, ``HEADRACE_PORT``, ``headrace.toml: port``


def load(flags: Mapping[str, str], environ: Mapping[str, str], config: Path | None = None) -> Settings:
    """Put the layers on each other and check the outcome.

    Args:
        flags: setting name to text, only for flags that were given.
        config: a file that must exist; None reads ``./headrace.toml`` where there is one.

    Raises:
        SettingError: an unknown name, or a value that does not parse or is out of its bound; says where it came from.
    """
    given = {**_from_file(config), **_from_environ(environ), **_from_flags(flags)}
    values = {name: _parse(name, one) for name, one in given.items()}
    return Settings(**values)


def suggest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'port'?``, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def flag(name: str) -> str:
    """``max_running`` as a flag: ``--max-running``."""
    return "--" + name.replace("_", "-")


def _from_flags(flags: Mapping[str, str]) -> dict[str, Given]:
    return {name: Given(value=value, source=flag(name)) for name, value in flags.items()}


def _from_environ(environ: Mapping[str, str]) -> dict[str, Given]:
    variables = {PREFIX + name.upper(): name for name in RULES}
    for variable in environ:
        if variable.startswith(PREFIX) and variable not in variables and variable not in ROOM_VARIABLES:
            raise SettingError(f"{variable}: no such setting{suggest(variable, variables)}")
    names = {**BORROWED, **variables}  # later entries win: HEADRACE_REDIS_URL over REDIS_URL
    return {names[v]: Given(value=environ[v], source=v) for v in names if environ.get(v)}


def _from_file(config: Path | None) -> dict[str, Given]:
    path = config or Path(FILE)
    if config is None and not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from error
    for key in table:
        if key not in RULES:
            raise SettingError(f"{path}: no such setting: {key}{suggest(key, RULES)}")
    return {key: Given(value=value, source=f"{path}: {key}") for key, value in table.items()}


def _parse(name: str, given: Given) -> Any:
    """The value in its setting's type, checked.

    Raises:
        SettingError: naming the source.
    """
    wanted = TYPES[name]
    try:
        value = _convert(given.value, wanted)
        RULES[name].check(name, value)
    except SettingError as error:
        raise SettingError(f"{given.source}: {error}") from None
    except ValueError:
        words = {int: "a whole number", float: "a number"}.get(wanted, "text")
        raise SettingError(f"{given.source}: {name} must be {words}, not {given.value!r}") from None
    return value


def _convert(value: object, wanted: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("only text and numbers")
    if isinstance(value, float) and wanted is not float:
        raise ValueError("a fraction")
    if isinstance(value, int) and wanted is str:
        raise ValueError("a number where text belongs")
    return wanted(value)
