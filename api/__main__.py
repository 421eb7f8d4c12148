"""``python -m api``: the HTTP server, told everything by ``HEADRACE_<NAME>``."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import uvloop

from api.app import create_app
from api.log import gather
from api.server import server
from api.settings import ApiSettings
from core.errors import StoreUnavailable, UnsafeServer
from jobs.async_store import AsyncStore
from jobs.settings import StoreSettings, from_environ

log = logging.getLogger("headrace.api")

YOUNG = 20_000  #: new objects before Python looks for cycles among them: of 700, most would be of requests under way


def main() -> int:
    """Serve until told to stop.

    Returns:
        0 after a clean end, 2 when a setting is wrong.
    """
    try:
        settings = from_environ(ApiSettings, os.environ)
        store_settings = from_environ(StoreSettings, os.environ)
        settings.read_key()
    except ValueError as error:
        print(f"headrace api: {error}", file=sys.stderr)
        return 2
    gather(settings.log_level)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # uvicorn takes over while it serves, and raises the signal again at its end
    return uvloop.run(_serve(settings, store_settings))


async def _serve(settings: ApiSettings, store_settings: StoreSettings) -> int:
    store = AsyncStore.connect(store_settings)
    try:
        await store.inspect()
    except UnsafeServer as error:
        print(f"headrace api: {error}", file=sys.stderr)
        return 2
    except StoreUnavailable as error:
        log.warning("%s; /ready says 503 until it answers", error)
    app = create_app(settings, store)
    gc.freeze()  # what is here stays: each full collection would walk through all of it again
    gc.set_threshold(YOUNG)
    try:
        await server(app, settings).serve()
    finally:
        await store.close()
    return 0


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
