"""``python -m worker.health``: exit code 0 while a worker of this host (this container) holds its lease."""

from __future__ import annotations

import os
import socket
import sys

from core.errors import StoreError
from jobs.settings import StoreSettings, from_environ
from jobs.store import Store


def main() -> int:
    """Ask Redis, where everybody else sees a worker too: a process that merely exists may have stopped working."""
    store = Store.connect(from_environ(StoreSettings, os.environ))
    try:
        workers = store.workers()
    except StoreError as error:
        print(f"headrace worker: {error}", file=sys.stderr)
        return 1
    finally:
        store.close()
    return 0 if any(worker.host == socket.gethostname() for worker in workers) else 1


if __name__ == "__main__":
    sys.exit(main())
