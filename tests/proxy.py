"""A proxy in front of a real Valkey that sees each command by name, and can spoil one at a chosen moment.

    with proxied(valkey_url) as proxy:
        proxy.before("claim", kill)                 # the worker dies before its claim arrives
        proxy.after("settle", kill)                 # … once Valkey has settled, before the worker hears of it
        proxy.after("submit", cut)                  # done, and the reply is lost
        held = proxy.after("WAITAOF", Held())       # the disk's word comes when the test says so

Scripts go by their file's name, commands by theirs in capitals. What a process says on other connections passes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypedDict, Unpack

from jobs.scripting import scripts

PUSHED = ("SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE")  #: from then on replies belong to no command


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One command on its way to the server, or one reply on its way back."""

    name: str
    words: tuple[bytes, ...]
    inside: tuple[str, ...]  #: of EXEC: the commands of its transaction
    pid: int  #: of the process that spoke
    passing: bytes  #: what is about to be passed on


#: What to pass on in place of ``passing``; None cuts the connection, both ways.
Act = Callable[[Moment], bytes | None]


def cut(moment: Moment) -> None:
    """The connection breaks."""


def kill(moment: Moment) -> None:
    """The process that spoke dies, and its connection with it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(moment.pid, signal.SIGKILL)


class When(TypedDict, total=False):
    """Which of the commands of one name a rule means; the next one, where nothing is said."""

    times: int  #: so many of them
    skip: int  #: after so many
    matches: Callable[[Moment], bool]


class Held:
    """Passes nothing on until it is let go."""

    def __init__(self) -> None:
        self.holding = threading.Event()
        self.free = threading.Event()

    def __call__(self, moment: Moment) -> bytes:
        self.holding.set()
        self.free.wait()
        return moment.passing


@dataclass(slots=True, eq=False)
class Rule:
    """What happens, at which command, so often."""

    name: str
    act: Act
    times: int  #: then it is over
    skip: int  #: so many pass first
    matches: Callable[[Moment], bool]
    happened: threading.Event = field(default_factory=threading.Event)  #: it was carried out at least once

    def takes(self, moment: Moment) -> bool:
        if self.name != moment.name or not self.times or not self.matches(moment):
            return False
        self.skip -= 1
        if self.skip >= 0:
            return False
        self.times -= 1
        return True


class Proxy:
    """Listens on a unix socket, and speaks to the server on another."""

    def __init__(self, server_path: str, own_path: str) -> None:
        self.url = f"unix://{own_path}"
        self.seen: Counter[str] = Counter()  #: commands that have arrived here, by name
        self._server_path = server_path
        self._names = {script.sha.encode(): name for name, script in scripts().items()}
        self._before: list[Rule] = []
        self._after: list[Rule] = []
        self._lock = threading.Lock()
        self._open: set[Link] = set()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(own_path)
        self._listening.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def before(self, name: str, act: Act, **when: Unpack[When]) -> Rule:
        """Act on a command that the server has not seen; ``times``, ``skip`` and ``matches`` say on which."""
        return self._add(self._before, name, act, when)

    def after(self, name: str, act: Act, **when: Unpack[When]) -> Rule:
        """Act on a reply, when the server has done what it was told and nobody knows."""
        return self._add(self._after, name, act, when)

    def act_on(self, moment: Moment, *, done: bool) -> bytes | None:
        """What to pass on."""
        with self._lock:
            self.seen[moment.name] += not done
            rule = next((rule for rule in (self._after if done else self._before) if rule.takes(moment)), None)
        if rule is None:
            return moment.passing
        passed = rule.act(moment)
        rule.happened.set()
        return passed

    def name_of(self, words: tuple[bytes, ...]) -> str:
        command = words[0].decode().upper()
        return self._names.get(words[1], command) if command == "EVALSHA" else command

    def close(self) -> None:
        """End, and cut every connection."""
        self._listening.close()
        for rule in (*self._before, *self._after):
            if isinstance(rule.act, Held):
                rule.act.free.set()
        self.cut_all()

    def cut_all(self) -> None:
        """Every connection breaks now."""
        for link in list(self._open):
            link.cut()

    def _add(self, rules: list[Rule], name: str, act: Act, when: When) -> Rule:
        rule = Rule(name, act, when.get("times", 1), when.get("skip", 0), when.get("matches", lambda moment: True))
        with self._lock:
            rules.append(rule)
        return rule

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._server_path)
            except OSError:  # it is down: whoever called finds out as if it had called there
                client.close()
                server.close()
                continue
            link = Link(self, client, server)
            self._open.add(link)
            link.start(self._open.discard)


class Link:
    """One connection: commands one way, replies the other, each in a thread."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self._pid: int = struct.unpack("3i", credentials)[0]
        self._waiting: deque[Moment] = deque()  # commands without a reply, oldest first
        self._pushed = False
        self._inside: list[str] = []

    def start(self, ended: Callable[[Link], None]) -> None:
        def run() -> None:
            replies = threading.Thread(target=self._run, args=(self._server, self._pass_replies), daemon=True)
            replies.start()
            self._run(self._client, self._pass_commands)
            replies.join()
            self._client.close()
            self._server.close()
            ended(self)

        threading.Thread(target=run, daemon=True).start()

    def cut(self) -> None:
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _run(self, source: socket.socket, pump: Callable[[BinaryIO], None]) -> None:
        with contextlib.suppress(OSError, EOFError), source.makefile("rb") as file:
            pump(file)
        self.cut()

    def _pass_commands(self, file: BinaryIO) -> None:
        while True:
            raw, words = read_command(file)
            moment = self._moment(raw, words)
            passed = self._proxy.act_on(moment, done=False)
            if passed is None:
                return
            self._waiting.append(moment)
            self._pushed = self._pushed or moment.name in PUSHED
            self._server.sendall(passed)

    def _pass_replies(self, file: BinaryIO) -> None:
        while True:
            raw = read_value(file)
            if not self._pushed:
                asked = self._waiting.popleft()
                reply = Moment(name=asked.name, words=asked.words, inside=asked.inside, pid=asked.pid, passing=raw)
                passed = self._proxy.act_on(reply, done=True)
                if passed is None:
                    return
                raw = passed
            self._client.sendall(raw)

    def _moment(self, raw: bytes, words: tuple[bytes, ...]) -> Moment:
        name = self._proxy.name_of(words)
        inside = tuple(self._inside) if name == "EXEC" else ()
        self._inside = [] if name in ("MULTI", "EXEC") else [*self._inside[-99:], name]
        return Moment(name=name, words=words, inside=inside, pid=self._pid, passing=raw)


@contextlib.contextmanager
def proxied(url: str) -> Iterator[Proxy]:
    """A proxy in front of the server at this unix socket."""
    with tempfile.TemporaryDirectory(prefix="hr-") as folder:
        proxy = Proxy(url.removeprefix("unix://"), str(Path(folder) / "proxy.sock"))
        try:
            yield proxy
        finally:
            proxy.close()


def read_command(file: BinaryIO) -> tuple[bytes, tuple[bytes, ...]]:
    """The next command: its bytes, and its words. Raises EOFError."""
    raw = _line(file)
    if raw[:1] != b"*":
        return raw, tuple(raw.split())
    words = []
    for _ in range(int(raw[1:])):
        length = _line(file)
        word = _exactly(file, int(length[1:]) + 2)
        raw += length + word
        words.append(word[:-2])
    return raw, tuple(words)


def read_value(file: BinaryIO) -> bytes:
    """The bytes of the next reply, in either version of the protocol. Raises EOFError."""
    line = _line(file)
    kind, rest = line[:1], line[1:]
    if kind in b"$=!" and int(rest) >= 0:
        return line + _exactly(file, int(rest) + 2)
    if kind in b"*~>%|":
        count = int(rest) * (2 if kind in b"%|" else 1) + (kind == b"|")
        return line + b"".join(read_value(file) for _ in range(count))
    return line


def _line(file: BinaryIO) -> bytes:
    line = file.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError
    return line


def _exactly(file: BinaryIO, length: int) -> bytes:
    found = file.read(length)
    if len(found) < length:
        raise EOFError
    return found
