"""``headrace up``: Valkey, API, workers, a courier: processes in one terminal; who starts after whom, who ends last."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace

import httpx2

from headrace.embedded import DataFolder, find_server
from headrace.rooms import command, environment, fetch_command, tethered
from headrace.settings import SettingError, Settings
from headrace.supervise import Child, PermanentFailure, Role

API_STOP_SECONDS = 10.0
VALKEY_STOP_SECONDS = 30.0
DRAIN_MARGIN_SECONDS = 5.0
COURIER_MARGIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Everything answers: what a person, or the program that started us, wants to know."""

    url: str
    model: str
    workers: int
    redis_url: str  #: for RQ's own tools; empty where REDIS_URL gave it: then everybody knows it


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """Where words go."""

    log: Callable[[str, str], None]  #: of a room: its name and one line
    note: Callable[[str], None]  #: of our own, that nobody needs to act on
    ready: Callable[[Ready], None]


def check_before_start(settings: Settings) -> Settings:
    """Refuse what cannot work before anything is started, and settle the port.

    Raises:
        SettingError: an open door, a port in use, or no address to listen on.
    """
    settings.refuse_open_door()
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise SettingError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from error
        return replace(settings, port=probe.getsockname()[1])


class House:
    """The rooms as processes. Starts Valkey, then API, courier, model and workers; stops them the other way round."""

    def __init__(self, settings: Settings, inherited: Mapping[str, str], terminal: Terminal) -> None:
        self._settings = settings
        self._inherited = inherited
        self._terminal = terminal
        self._folder: DataFolder | None = None
        self._valkey: Child | None = None
        self._api: Child | None = None
        self._courier: Child | None = None
        self._workers: list[Child] = []
        self._fetch: asyncio.subprocess.Process | None = None
        self._stop = asyncio.Event()
        self._signals = 0
        self._failure: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM.

        Raises:
            SettingError: what was asked for cannot be started.
            PermanentFailure: a room says that its configuration can never work.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        self._watch(self._open())
        await self._stop.wait()
        try:
            await self._close()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)
        if self._failure is not None:
            raise self._failure

    # Opening

    async def _open(self) -> None:
        redis_url = self._settings.redis_url or await self._open_valkey()
        self._settings = replace(self._settings, redis_url=redis_url)
        self._api = self._keep(self._role("api", command("api")))
        if self._settings.calls_back:
            self._courier = self._keep(self._role("courier", command("courier")))
        await self._fetch_model()
        for index in range(self._settings.workers):
            self._workers.append(self._keep(self._worker_role(index)))
        await self._announce()

    async def _open_valkey(self) -> str:
        program = find_server()
        self._folder = folder = DataFolder.open(self._settings.data_folder)
        role = Role(
            name="valkey",
            command=(str(program), "-"),
            environment=self._inherited,
            standard_input=folder.configuration(),
            files=(folder.lock_descriptor,),
            death_signal="TERM",
        )
        self._valkey = self._keep(role)
        while folder.ping() != "PONG":
            await asyncio.sleep(0.02)
        return folder.url

    def _role(self, name: str, argv: tuple[str, ...], **changes: str) -> Role:
        return Role(name=name, command=argv, environment=environment(self._settings, self._inherited, **changes))

    def _worker_role(self, index: int) -> Role:
        name = f"{self._settings.worker_name}-{index}" if self._settings.worker_name else ""
        changes = {"worker_index": str(index)} | ({"worker_name": name} if name else {})
        return self._role(f"worker-{index}", command("worker"), **changes)

    async def _fetch_model(self) -> None:
        """Have the model in the cache before several workers want it at once; its progress goes to the terminal."""
        if self._settings.engine != "torch":
            return
        self._fetch = await asyncio.create_subprocess_exec(
            *tethered(fetch_command(self._settings)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            env=environment(self._settings, self._inherited),
            start_new_session=True,
        )
        if code := await self._fetch.wait():
            raise PermanentFailure(f"fetching the model {self._settings.model!r}", code)

    async def _announce(self) -> None:
        """Say so once API and every worker answer."""
        url = f"http://{_in_url(self._settings.host)}:{self._settings.port}"
        key = self._settings.read_api_key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx2.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=5) as client:
            while len(workers := await _entries(client, "/v1/workers")) < self._settings.workers:
                await asyncio.sleep(0.1)
            models = await _entries(client, "/v1/models")
        redis_url = self._folder.url if self._folder else ""
        names = ", ".join(str(model["id"]) for model in models)
        self._terminal.ready(Ready(url=url, model=names, workers=len(workers), redis_url=redis_url))

    # Closing

    def _on_signal(self) -> None:
        """First: drain. Second: workers hand their jobs back at once. Third: no more patience."""
        self._signals += 1
        self._stop.set()
        if self._signals == 2:
            self._terminal.note("handing running jobs back; once more kills")
            for worker in self._workers:
                worker.send(signal.SIGTERM)
        elif self._signals > 2:
            for child in (*self._workers, self._courier, self._api):
                if child is not None:
                    child.kill()

    async def _close(self) -> None:
        """Workers, then courier, API and Valkey: nobody loses what it still needs."""
        self._tasks[0].cancel()  # opening, where it has not ended
        if self._fetch is not None and self._fetch.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._fetch.pid, signal.SIGKILL)
            await self._fetch.wait()
        if self._workers and self._failure is None:
            self._terminal.note(f"draining for up to {self._settings.drain_seconds:g} s; again hands jobs back")
        patience = self._settings.drain_seconds + DRAIN_MARGIN_SECONDS
        await asyncio.gather(*(worker.stop(patience) for worker in self._workers))
        if self._courier is not None:
            await self._courier.stop(self._settings.webhook_timeout_seconds + COURIER_MARGIN_SECONDS)
        if self._api is not None:
            await self._api.stop(API_STOP_SECONDS)
        if self._valkey is not None:
            await self._valkey.stop(VALKEY_STOP_SECONDS)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._folder is not None:
            self._folder.close()
        self._terminal.note("stopped")

    # Watching

    def _keep(self, role: Role) -> Child:
        child = Child(role, self._terminal.log)
        self._watch(child.keep())
        return child

    def _watch(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._on_end)
        self._tasks.append(task)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
            self._stop.set()


def _in_url(host: str) -> str:
    """Where a client on this host reaches what listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


async def _entries(client: httpx2.AsyncClient, path: str) -> list[dict[str, object]]:
    """What a list of the API holds; nothing while it is not there yet."""
    try:
        reply = await client.get(path)
    except httpx2.TransportError:
        return []
    return list(reply.json()["data"]) if reply.is_success else []
