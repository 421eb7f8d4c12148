"""``python -m jobs doctor [--fix] [--json]``: look for what cannot be in the queue at ``REDIS_URL``, and mend it."""

from __future__ import annotations

import json
import os
import sys

from core.errors import StoreError
from jobs.doctor import Diagnosis, examine
from jobs.settings import SettingError, StoreSettings, from_environ
from jobs.store import Store

USAGE = "usage: python -m jobs doctor [--fix] [--json]   (HEADRACE_REDIS_URL or REDIS_URL says where the queue is)"
HEALTHY, PROBLEMS, USAGE_ERROR, UNREACHABLE = 0, 1, 2, 3


def main(arguments: list[str]) -> int:
    """Run the doctor; the exit code."""
    if arguments[:1] != ["doctor"] or not set(arguments[1:]) <= {"--fix", "--json"}:
        print(USAGE, file=sys.stderr)
        return HEALTHY if arguments in (["-h"], ["--help"]) else USAGE_ERROR
    try:
        settings = from_environ(StoreSettings, os.environ)
        if not settings.redis_url:
            raise SettingError("HEADRACE_REDIS_URL: say where the queue is")
        store = Store.connect(settings)
        diagnosis = examine(store, fix="--fix" in arguments)
    except SettingError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return USAGE_ERROR
    except StoreError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return UNREACHABLE
    print(json.dumps(diagnosis.to_wire()) if "--json" in arguments else describe(diagnosis), flush=True)
    return HEALTHY if diagnosis.healthy else PROBLEMS


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis for a person."""
    states = ", ".join(f"{count} {state}" for state, count in diagnosis.jobs.items() if count) or "no jobs"
    lines = [f"{states}; {diagnosis.workers} workers alive, {diagnosis.suspects} suspects"]
    lines += [f"note: {note}" for note in diagnosis.notes]
    for finding in diagnosis.findings:
        lines.append(f"{finding.what}: {finding.problem}")
        lines.append(f"    mended: {finding.done}" if finding.done else "    not mended")
    if not diagnosis.findings:
        lines.append("every job is in the one place its state names")
    elif not diagnosis.healthy:
        lines.append("headrace doctor --fix mends what can be mended")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
