"""``python -m courier``: deliver callbacks from the queue at ``REDIS_URL``; told everything by ``HEADRACE_<NAME>``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence

from courier.post import Poster
from courier.rounds import Courier
from courier.settings import CourierSettings
from jobs.outbox import Outbox
from jobs.settings import StoreSettings, from_environ

CLEAN, BAD_CONFIGURATION = 0, 2
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main() -> int:
    """Deliver until told to stop; the exit code."""
    try:
        settings, store_settings = from_environ(CourierSettings, os.environ), from_environ(StoreSettings, os.environ)
        if not store_settings.redis_url:
            raise ValueError("HEADRACE_REDIS_URL: say where the queue is")
        keys = settings.read_secrets()
    except ValueError as error:
        print(f"courier: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)
    for library in ("httpx2", "httpcore2"):  # they log whole addresses, and an address may hold a secret
        logging.getLogger(library).setLevel(logging.WARNING)
    asyncio.run(serve(settings, store_settings, keys))
    return CLEAN


async def serve(settings: CourierSettings, store_settings: StoreSettings, keys: Sequence[bytes]) -> None:
    """Make the rounds until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    outbox = Outbox(store_settings)
    async with Poster(settings.hosts, keys, settings.webhook_timeout_seconds) as poster:
        await Courier(outbox, poster, settings.webhook_timeout_seconds, settings.pauses).run(stop)
    await outbox.close()


if __name__ == "__main__":
    sys.exit(main())
