"""A script is its file behind what all share: the keys, the fields of a poll, ``scripts/lib``. Knows no connection."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from jobs import keys

T = TypeVar("T", covariant=True)
FOLDER = Path(__file__).parent / "scripts"
SHARED = ("base", "log", "outbox", "moves")  #: of ``scripts/lib``, in this order

#: The fields of a job's hash that answer a poll: the status comes first, the callback's id second, the priority last.
SEEN = (
    "status", "callback", "kind", "model", "attempt", "crashes", "created_at", "started_at", "ended_at",
    "first_token_at", "expires_at", "deadline_at", "worker_name", "tokens", "cancel_requested", "ticket",
    "error", "reason", "metadata", "result_ttl", "events", "place", "closed", "waiting_for", "resume", "log", "deaths",
    "webhook", "priority",
)  # fmt: skip

#: What RQ's pages show for ends that nobody computed.
EXC = {
    "deadline": "the deadline passed before the job was done",
    "engine": "EngineChanged: no worker of the kind that began the answer came back in time",
    "poison": "PoisonJob: the job was running each time its worker died",
}


@dataclass(frozen=True, slots=True)
class Script:
    """Lua text and the name Redis knows it by."""

    name: str
    text: str
    sha: str


@dataclass(frozen=True, slots=True)
class Command(Generic[T]):
    """One round trip to be: what to send, and how to read the answer."""

    name: str  #: of a script, or of a Redis command in capitals
    args: Sequence[Any]
    decode: Callable[[Any], T]


@functools.cache
def scripts() -> Mapping[str, Script]:
    """All scripts by name."""
    names = sorted(path.stem for path in FOLDER.glob("*.lua"))
    return {name: build(name, (FOLDER / f"{name}.lua").read_text(encoding="utf-8")) for name in names}


def build(name: str, source: str) -> Script:
    """The script of Lua text that begins with its shebang, with what it uses of what all share."""
    shebang, body = source.split("\n", 1)
    body = _literal(body)
    text = "\n".join([shebang, *_needed(body), body])
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def pack_exc(text: str) -> str:
    """Text as RQ's result stream holds it."""
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _needed(body: str) -> list[str]:
    """What ``body`` uses of what all share, in order. No more, since Redis runs all of a script anew at each call."""
    words, needed = _words(body), list[str]()
    for name, part in reversed(_shared()):
        if name in words:
            needed.append(part)
            words |= _words(part)
    return needed[::-1]


def _shared() -> list[tuple[str, str]]:
    """The definitions that scripts share, by name, each behind those it uses."""
    exc = {key: pack_exc(text) for key, text in EXC.items()}
    seen = ",".join(f"'{field}'" for field in SEEN)
    tables = f"local K={_table(keys.table())}\nlocal EXC={_table(exc)}\nlocal SEEN={{{seen}}}\n"
    library = [(FOLDER / "lib" / f"{part}.lua").read_text(encoding="utf-8") for part in SHARED]
    parts = re.split(r"^local (?=(?:function )?(\w+))", tables + _literal("\n".join(library)), flags=re.MULTILINE)
    return [(name, f"local {part}") for name, part in zip(parts[1::2], parts[2::2], strict=True)]


def _literal(text: str) -> str:
    """Lua text without comments, with keys in the places of their names: that saves the table of them."""
    table = keys.table()
    return re.sub(r"\bK\.(\w+)", lambda found: f"'{table[found[1]]}'", re.sub(r"\s*--.*", "", text))


def _words(text: str) -> set[str]:
    """The names that Lua text may mean: none in strings, and no fields."""
    return set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", re.sub(r"'[^'\n]*'", "", text)))


def _table(values: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{name}='{value}'" for name, value in values.items()) + "}"
