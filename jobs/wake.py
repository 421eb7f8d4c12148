"""How an idle worker waits for jobs: blocked on the wake lists, on a connection of its own. Knows no job."""

from __future__ import annotations

from collections.abc import Sequence

import redis

from core.errors import StoreUnavailable
from jobs.connection import connect, explain

LONGEST_SECONDS = 2.0  #: a wait that a hanging server never ends is cut by the connection's time-out, which is longer


class Sleeper:
    """One thread that waits, and may be woken by any other or by a signal."""

    def __init__(self, url: str) -> None:
        """Take Redis' address; nothing is sent yet."""
        self._client = connect(url)
        self._interrupted = False

    def wait(self, lists: Sequence[str], seconds: float) -> bool:
        """Block until something is pushed, for LONGEST_SECONDS at most; False when nothing was.

        Raises:
            StoreUnavailable: Redis is away, or ``interrupt`` was called.
        """
        try:  # 0 seconds would be for ever
            return self._client.blpop(list(lists), timeout=min(max(seconds, 0.01), LONGEST_SECONDS)) is not None
        except (redis.RedisError, OSError) as error:
            raise explain(error) from error
        except (AttributeError, TypeError, ValueError) as error:  # it was about to use the socket that interrupt took
            if not self._interrupted:
                raise
            raise StoreUnavailable("the wait was interrupted") from error

    def interrupt(self) -> None:
        """End a wait that goes on now."""
        self._interrupted = True
        self._client.connection_pool.disconnect()

    def close(self) -> None:
        self._client.close()
