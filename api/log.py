"""The lines of this process' log, written together once a second: each by itself would wake whoever reads them.

A warning is written at once, with all before it. A process that is killed takes the lines of its last second along.
"""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MOST = 1_000  #: lines that wait

_gathered: list[MemoryHandler] = []


def gather(level: str) -> None:
    """Log to standard error from ``level`` on; ``write`` is to be called now and then."""
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter(FORMAT))
    _gathered.append(MemoryHandler(MOST, flushLevel=logging.WARNING, target=lines))
    logging.basicConfig(level=level.upper(), handlers=_gathered)
    # What FORMAT does not say need not be found out for each line ("Optimization" in Python's logging HOWTO).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # documented there


def write() -> None:
    """Write what waits."""
    for handler in _gathered:
        handler.flush()
