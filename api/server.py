"""uvicorn as we run it: bounded heads, quick and clean ends. Knows no routes and no environment."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.context import Context
from api.log import write
from api.settings import ApiSettings

MAX_HEAD_BYTES = 65_536  #: request line and headers together, as h11 has it; httptools alone has no bound
CHUNK_BYTES = 16  #: what the frame of one chunk of a body may take
TICK_SECONDS = 1.0  #: between two dates of the Date header, and two writings of the log
CLOSE_SECONDS = 10  #: after this, requests still open at the end are cut off


class BoundedHead(HttpToolsProtocol):
    """Cuts a connection whose bytes around bodies (request lines, headers, trailers) grow past ``MAX_HEAD_BYTES``."""

    _head_bytes = 0  #: of the current request: everything received that was no body

    def on_body(self, body: bytes) -> None:
        self._head_bytes = max(0, self._head_bytes - len(body) - CHUNK_BYTES)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes from the client; what belongs to a body is the guard's to bound."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("Request head too large.")


class Server(uvicorn.Server):
    """Lets go of held requests at the first signal: a stream's client comes back, a wait is answered at once."""

    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self._context = context
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = asyncio.Event()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def main_loop(self) -> None:
        """Renew the date and write the log until a signal has come; uvicorn's own looks ten times a second for one."""
        while not await self.on_tick(0):
            write()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._ending.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)
        super().handle_exit(sig, frame)

    def _end(self) -> None:
        self._ending.set()
        self._context.held.close()


def server(app: FastAPI, settings: ApiSettings) -> Server:
    """The server for ``app``, not yet listening."""
    config = uvicorn.Config(
        app,
        host=settings.host.strip("[]"),
        port=settings.port,
        loop="uvloop",
        http=BoundedHead,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level=settings.log_level,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    return Server(config, app.state.context)
