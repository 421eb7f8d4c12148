"""One attempt: a signed POST to a checked address, and what its answer means. Knows no Redis and no schedule."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType

import httpx2

from courier import guard, signing
from jobs.outbox import Callback
from jobs.webhooks import AllowedHosts, NotAllowed, Target, located

GONE = 410
BUSY = (429, 503)
MOST_ADDRESSES = 3  #: of one name, tried in turn where nobody answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How an attempt went."""

    delivered: bool = False
    gone: bool = False  #: the receiver wants no more of it
    retry_after_seconds: float = 0.0  #: it wants to be left alone for so long
    why: str = ""  #: for our log alone: a client who could read it could explore our network


class Poster:
    """Sends callbacks; a connection for each, because one that was checked for a host is no other host's."""

    def __init__(
        self,
        hosts: AllowedHosts,
        keys: Sequence[bytes],
        timeout_seconds: float,
        *,
        resolve: guard.Resolve = guard.resolve,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._hosts = hosts
        self._keys = keys
        self._timeout_seconds = timeout_seconds
        self._resolve = resolve
        self._clock = clock
        self._client = httpx2.AsyncClient(
            verify=ssl.create_default_context(),
            trust_env=False,
            follow_redirects=False,
            timeout=None,  # one clock for the whole attempt, below
            limits=httpx2.Limits(max_keepalive_connections=0),
        )

    async def __aenter__(self) -> Poster:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def send(self, callback: Callback) -> Answer:
        """Tell the receiver, and hear what it says; raises nothing."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._try_addresses(callback)
        except (NotAllowed, httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError) as error:
            return Answer(why=type(error).__name__)

    async def _try_addresses(self, callback: Callback) -> Answer:
        target = self._hosts.target(callback.url)
        *others, last = (await guard.addresses(target, self._resolve))[:MOST_ADDRESSES]
        for address in others:
            try:
                return await self._post(target, address, callback)
            except httpx2.ConnectError:
                continue
        return await self._post(target, last, callback)

    async def _post(self, target: Target, address: str, callback: Callback) -> Answer:
        """Of the answer only the head is read."""
        content = signing.body(callback)
        headers = {
            "host": target.netloc,
            "content-type": "application/json",
            "user-agent": "headrace",
            **signing.headers(callback.id, int(self._clock()), content, self._keys),
        }
        url = f"{target.scheme}://{located(address, target.port)}{target.path}"
        extensions = {"sni_hostname": target.host}  # the certificate is the name's
        async with self._client.stream("POST", url, content=content, headers=headers, extensions=extensions) as reply:
            return self._read(reply)

    def _read(self, reply: httpx2.Response) -> Answer:
        busy = reply.status_code in BUSY
        return Answer(
            delivered=reply.is_success,
            gone=reply.status_code == GONE,
            retry_after_seconds=self._pause(reply.headers.get("retry-after", "")) if busy else 0.0,
            why=str(reply.status_code),
        )

    def _pause(self, text: str) -> float:
        """``Retry-After`` in seconds: it may be a number or a date; 0 where it is neither."""
        if text.strip().isdecimal():
            return float(text)
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - self._clock())
        except (ValueError, OverflowError):
            return 0.0
