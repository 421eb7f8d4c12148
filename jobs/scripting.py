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
    """All scripts by name, in the order in which they are to be loaded: publishing must never be there later than
    settling, or a pipeline that meets a server without scripts could settle a job before its last words."""
    names = sorted(path.stem for path in FOLDER.glob("*.lua"))
    return {name: _build(name) for name in names}


def pack_exc(text: str) -> str:
    """Text as RQ's result stream holds it."""
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _build(name: str) -> Script:
    shebang, body = (FOLDER / f"{name}.lua").read_text(encoding="utf-8").split("\n", 1)
    exc = {key: pack_exc(text) for key, text in EXC.items()}
    seen = ",".join(f"'{field}'" for field in SEEN)
    shared = [(FOLDER / "lib" / f"{part}.lua").read_text(encoding="utf-8") for part in SHARED]
    text = "\n".join((shebang, f"local EXC={_table(exc)} local SEEN={{{seen}}}", *shared, body))
    # Redis runs all of it anew at each call: a key in the place of its name saves the table of them.
    table = keys.table()
    text = re.sub(r"\bK\.(\w+)", lambda found: f"'{table[found[1]]}'", text)
    if "K[" in text:
        text = text.replace("\n", f"\nlocal K={_table(table)} ", 1)
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _table(values: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{name}='{value}'" for name, value in values.items()) + "}"
