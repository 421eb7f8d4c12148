"""``python -m worker``: the parent; with ``--engine-process PARENT PIPE``: the process that it starts."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from core.errors import ModelError, UnsafeServer
from core.threads import keep_calm
from jobs.settings import SettingError, StoreSettings, from_environ
from worker.parent import CLEAN, CRASHED, PERMANENT, Parent, ParentConfig, die_with
from worker.pulse import Pulse
from worker.settings import WorkerSettings

ENGINE_PROCESS = "--engine-process"
#: vLLM tells its makers of each start; nothing of ours calls home unless somebody says so.
VLLM_QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
USAGE = "usage: python -m worker   (settings: HEADRACE_<NAME> in the environment; see docs/workers.md)"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
KILL_AFTER_SECONDS = 3.0  #: the parent gives a draining process so much longer than it asked for

log = logging.getLogger("headrace.worker")


def main() -> int:
    """Run the parent or the engine process; the exit code."""
    arguments = sys.argv[1:]
    if arguments and not (arguments[0] == ENGINE_PROCESS and len(arguments) == 3):
        print(USAGE, file=sys.stderr)
        return CLEAN if arguments in (["-h"], ["--help"]) else PERMANENT
    pulse = Pulse(int(arguments[2])) if arguments else Pulse()
    try:
        settings, store_settings = from_environ(WorkerSettings, os.environ), from_environ(StoreSettings, os.environ)
        logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)
        if not arguments:
            return run_parent(settings, store_settings, os.environ)
        die_with(int(arguments[1]))
        if settings.engine == "torch":
            keep_calm(settings.dtype, os.environ)
        from worker.engine_process import serve

        serve(settings, store_settings, pulse)
    except (SettingError, ModelError, UnsafeServer) as error:
        print(f"worker: {error}", file=sys.stderr)
        return PERMANENT
    except Exception as error:
        log.exception("the engine process ends; its jobs go on elsewhere")
        pulse.say(type(error).__name__)
        return CRASHED
    return CLEAN


def run_parent(settings: WorkerSettings, store_settings: StoreSettings, environment: Mapping[str, str]) -> int:
    """Keep an engine process running; the exit code."""
    from jobs.store import Store

    rooms = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (rooms, environment.get("PYTHONPATH"))))
    quiet = {**VLLM_QUIET, "VLLM_LOGGING_LEVEL": settings.log_level.upper()} if settings.engine == "vllm" else {}
    config = ParentConfig(
        command=(sys.executable, "-P", "-m", "worker", ENGINE_PROCESS, str(os.getpid())),
        environment={**quiet, **environment, "PYTHONPATH": path},
        name=settings.worker_name,
        stop_seconds=settings.drain_seconds + KILL_AFTER_SECONDS,
        stall_seconds=settings.stall_seconds,
    )
    code = Parent(config, Store.connect(store_settings).expire_lease).run()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # on its way out the interpreter would die of another one
    return code


if __name__ == "__main__":
    sys.exit(main())
