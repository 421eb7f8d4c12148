"""``doctor``: looks through the queue for what cannot be, and mends it; ``python -m jobs doctor`` is who does it."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess

from headrace import rooms
from headrace.settings import SettingError, Settings
from headrace.verbs.verb import Invocation, Verb


def doctor(invocation: Invocation) -> int:
    """Run it on the Redis of the settings, or on the queue that ``up`` keeps; its exit code is ours."""
    settings = _with_redis(invocation)
    arguments = invocation.arguments
    flags = [*(["--fix"] if arguments.fix else []), *(["--json"] if arguments.json else [])]
    argv = rooms.command("jobs", "doctor", *flags)
    code = subprocess.run(argv, env=rooms.environment(settings, invocation.environ), check=False).returncode
    return code if code >= 0 else 128 - code  # as a shell has it for one that a signal ended


def _with_redis(invocation: Invocation) -> Settings:
    """The settings with an address in them.

    Raises:
        SettingError: there is none.
    """
    settings = invocation.settings
    if settings.redis_url:
        return settings
    path = settings.data_folder / "redis-url"
    try:
        address = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"which Redis? set REDIS_URL or --redis-url, or --data-dir of a headrace up ({path}: {error})"
        ) from error
    invocation.note(f"looking at the queue of headrace up in {settings.data_folder}")
    return dataclasses.replace(settings, redis_url=address)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fix", action="store_true", help="mend what is found")


DOCTOR = Verb(
    name="doctor",
    text="look through the queue for what cannot be; 0 healthy or mended, 1 problems found, 3 no Redis",
    example="headrace doctor --fix",
    settings=("redis_url", "data_dir"),
    run=doctor,
    add=_add,
)
