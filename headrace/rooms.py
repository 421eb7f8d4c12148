"""Where the other rooms lie and how they are started as processes. Imports none of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from headrace.settings import BORROWED, PREFIX, ROOM_VARIABLES, Settings

#: Exit code of a room whose configuration can never work: starting it again changes nothing.
BAD_CONFIGURATION = 2


def rooms_folder() -> Path:
    """The folder that holds the rooms: inside the published package, or our checkout."""
    package = Path(__file__).parent
    published = package / "_rooms"
    return published if published.is_dir() else package.parent


def command(module: str, *arguments: str) -> tuple[str, ...]:
    """Start a module of a room; ``-P`` keeps the working folder's own ``api`` or ``core`` off the path."""
    return (sys.executable, "-P", "-m", module, *arguments)


def fetch_command(settings: Settings) -> tuple[str, ...]:
    """Put the model into the cache, with a progress bar on standard error."""
    revision = ("--revision", settings.revision) if settings.revision else ()
    return command("core.models.source", settings.model, *revision)


def tethered(argv: tuple[str, ...], death_signal: str = "KILL") -> tuple[str, ...]:
    """The same command, ended by the kernel when the process that started it dies (on Linux; elsewhere as it was)."""
    if sys.platform != "linux":
        return argv
    tether = Path(__file__).parent / "tether" / "__main__.py"
    return (sys.executable, "-I", "-S", str(tether), death_signal, str(os.getpid()), *argv)


def environment(settings: Settings, inherited: Mapping[str, str], **changes: str) -> dict[str, str]:
    """What a room's process sees: our settings, and the caller's environment without anything they replace.

    Args:
        changes: settings that differ for this process, by name.
    """
    ours = {**settings.to_environment(), **{PREFIX + name.upper(): value for name, value in changes.items()}}
    kept = {name: value for name, value in inherited.items() if name in ROOM_VARIABLES or not name.startswith(PREFIX)}
    borrowed = {
        name: ours[PREFIX + setting.upper()] for name, setting in BORROWED.items() if PREFIX + setting.upper() in ours
    }
    path = os.pathsep.join(filter(None, (str(rooms_folder()), inherited.get("PYTHONPATH"))))
    return {**kept, **borrowed, **ours, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
