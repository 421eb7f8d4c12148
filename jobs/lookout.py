"""How a busy worker hears that jobs wait: it listens for arrivals, asks between two steps whether there is one for it,
and reads the answer between two later ones. What stock RQ puts in it finds when it asks unprompted, now and then."""

from __future__ import annotations

import select
import socket
from typing import Any

import redis

from core.card import ModelCard
from jobs import keys
from jobs.commands import waiting
from jobs.connection import connect, explained


class Lookout:
    """Listens and asks on connections of its own; only ``prepare`` may wait for Redis."""

    def __init__(self, url: str, card: ModelCard) -> None:
        """Take Redis' address, and the engine that jobs are wanted for; nothing is sent yet."""
        question, pool = waiting(card), connect(url).connection_pool
        self._connection: Any = pool.make_connection()
        self._ear: Any = pool.make_connection()
        self._question = self._connection.pack_command(question.name, *question.args)
        self._poll: select.poll | None = None  #: what says at once that nothing has come, where there is such a thing
        self._ready = False  #: connected
        self._heard = False  #: of an arrival about which nothing was asked yet
        self._asked = False  #: the answer is still to be read

    def prepare(self) -> None:
        """Connect, if that is to be done, and take in what arrived. To be called now and then: what nobody reads fills
        the server's buffers.

        Raises:
            StoreUnavailable
        """
        with explained():
            if not self._ready:
                self._connection.connect()
                self._ear.connect()
                self._ear.send_command("SUBSCRIBE", keys.ARRIVALS)
                self._ear.read_response()
                self._poll = _poll(self._connection, self._ear)
                self._ready, self._asked = True, False
            if self._stirs():
                self._listen()

    def jobs_wait(self, *, ask: bool) -> bool:
        """What has been answered since the last call; True, too, when nobody can say: who then claims hears why.

        Args:
            ask: ask again, though nothing was heard, unless an answer is still on its way.
        """
        found = False
        try:
            if self._ready and (ask or self._heard or self._stirs()):
                self._listen()
                if self._asked and self._connection.can_read(0):
                    self._asked = False
                    found = self._connection.read_response() > 0
                if (ask or self._heard) and not self._asked:
                    self._connection.send_packed_command(self._question, check_health=False)
                    self._asked, self._heard = True, False
        except (redis.RedisError, OSError):
            self.close()
            self._ready = self._asked = False
        return found or not self._ready

    def close(self) -> None:
        self._poll = None
        self._connection.disconnect()
        self._ear.disconnect()

    def _listen(self) -> None:
        while self._ear.can_read(0):
            self._ear.read_response()
            self._heard = True

    def _stirs(self) -> bool:
        """Whether something may have come, or a connection has ended. Asked before each step, and the client's own
        question takes ten times as long."""
        return self._poll is None or bool(self._poll.poll(0))


def _poll(*connections: Any) -> select.poll | None:
    """For the sockets of these; None where the client hides them, or what it has read of them (TLS)."""
    poll = select.poll()
    for connection in connections:
        found = getattr(connection, "_sock", None)
        if type(found) is not socket.socket:
            return None
        poll.register(found, select.POLLIN)
    return poll
