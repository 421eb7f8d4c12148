"""How a busy worker hears that jobs wait: it asks between two steps and reads the answer between two later ones."""

from __future__ import annotations

from typing import Any

import redis

from core.card import ModelCard
from jobs.commands import waiting
from jobs.connection import connect, explained


class Lookout:
    """Asks on a connection of its own; only ``prepare`` may wait for Redis."""

    def __init__(self, url: str, card: ModelCard) -> None:
        """Take Redis' address, and the engine that jobs are wanted for; nothing is sent yet."""
        question = waiting(card)
        self._connection: Any = connect(url).connection_pool.make_connection()
        self._question = self._connection.pack_command(question.name, *question.args)
        self._ready = False  #: connected
        self._asked = False  #: the answer is still to be read

    def prepare(self) -> None:
        """Connect, if that is to be done.

        Raises:
            StoreUnavailable
        """
        if not self._ready:
            with explained():
                self._connection.connect()
            self._ready, self._asked = True, False

    def jobs_wait(self, *, ask: bool) -> bool:
        """What has been answered since the last call; True, too, when nobody can say: who then claims hears why.

        Args:
            ask: ask again, unless an answer is still on its way.
        """
        found = False
        try:
            if self._asked and self._connection.can_read(0):
                self._asked = False
                found = self._connection.read_response() > 0
            if ask and not self._asked and self._ready:
                self._connection.send_packed_command(self._question, check_health=False)
                self._asked = True
        except (redis.RedisError, OSError):
            self._connection.disconnect()
            self._ready = self._asked = False
        return found or not self._ready

    def close(self) -> None:
        self._connection.disconnect()
