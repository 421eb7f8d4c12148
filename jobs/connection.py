"""How we connect to Redis, and what its faults mean to us. Knows no job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import NoPermissionError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as TooLate
from redis.retry import Retry

from core.errors import StoreError, StoreRefuses, StoreUnavailable, UnsafeServer
from jobs.reports import ServerReport
from jobs.settings import StoreSettings

REPLY_SECONDS = 5.0  #: a server that is silent for so long is taken for gone
CONNECT_SECONDS = 2.0
OLDEST = (7, 2)  #: of the Redis protocol: WAITAOF came with it

#: How an answer begins that says "not now" rather than "never": full, loading, read-only, failing over, not allowed in.
NOT_NOW = ("OOM", "MISCONF", "READONLY", "LOADING", "MASTERDOWN", "NOREPLICAS", "BUSY", "NOAUTH", "WRONGPASS", "NOPERM",
           "CLUSTERDOWN", "max number of clients")  # fmt: skip


def options(*, endless: bool = False) -> dict[str, Any]:
    """Arguments for a client: bytes out, no silent retry (it would run a claim twice), no eternal wait but if told."""
    timeout = None if endless else REPLY_SECONDS
    return {
        "protocol": 2,
        "socket_timeout": timeout,
        "socket_connect_timeout": CONNECT_SECONDS,
        "decode_responses": False,
    }


def connect(url: str, *, blocking: bool = False) -> redis.Redis:
    """A client for one thread; nothing is sent yet."""
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options(endless=blocking))


def connect_async(url: str) -> redis.asyncio.Redis:
    """A client for one event loop; nothing is sent yet. How long an answer may take is its user's to bound."""
    retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
    return redis.asyncio.Redis.from_url(url, retry=retry, **options(endless=True))


def explain(error: Exception) -> Exception:
    """Our word for a fault of Redis; what is none is given back as it is."""
    if isinstance(error, StoreError) or not isinstance(error, RedisError | OSError):
        return error
    text = str(error)
    if isinstance(error, Disconnected | TooLate | OSError):
        return StoreUnavailable(text or type(error).__name__)
    if "appendonly is disabled" in text:
        return UnsafeServer("appendonly", "no", "appendonly yes")
    if "when used memory > 'maxmemory'" in text:  # by itself, or as the reason why a transaction was discarded
        return StoreRefuses(text)
    if isinstance(error, ResponseError) and (text.startswith(NOT_NOW) or _is_refused(error)):
        return StoreUnavailable(text)
    return error


@contextmanager
def explained() -> Iterator[None]:
    """Faults of Redis in our words, for those who hold a client of their own.

    Raises:
        StoreUnavailable: in place of what the client raised.
    """
    try:
        yield
    except (RedisError, OSError) as error:
        raise explain(error) from error


def judge(info: Mapping[str, Any], fsync: str, settings: StoreSettings) -> ServerReport:
    """Read INFO, and refuse a server that cannot keep ``settings.durability``.

    Args:
        fsync: the setting ``appendfsync``, or "unknown".

    Raises:
        UnsafeServer: naming the setting.
        StoreUnavailable: it is loading; or a replica is wanted and none is there now.
    """
    if int(info.get("loading", 0)):  # it says appendonly = no for as long as it reads its append-only file
        raise StoreUnavailable("it is loading its data")
    version = str(info.get("redis_version", "0"))
    policy = str(info.get("maxmemory_policy", "unknown")) if int(info.get("maxmemory", 0)) else "none"
    report = ServerReport(
        software="valkey" if "valkey_version" in info else "redis",
        version=str(info.get("valkey_version", version)),
        append_only=bool(int(info.get("aof_enabled", 0))),
        fsync=fsync,
        eviction=policy,
        durability=settings.durability,
    )
    if settings.durability != "memory":
        _refuse_unsafe(report, version)
    if settings.durability == "replica" and not int(info.get("connected_slaves", 0)):
        raise StoreUnavailable('no replica is connected, and durability = "replica" needs one')
    return report


def _refuse_unsafe(report: ServerReport, version: str) -> None:
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UnsafeServer("redis_version", version, "7.2 or newer (WAITAOF)")
    if not report.append_only:
        raise UnsafeServer("appendonly", "no", "appendonly yes")
    if report.fsync == "no":
        raise UnsafeServer("appendfsync", "no", "appendfsync always (or everysec, at 0.1 s and more for each answer)")
    if report.eviction not in ("none", "noeviction"):
        raise UnsafeServer("maxmemory-policy", report.eviction, "maxmemory-policy noeviction")


def _is_refused(error: ResponseError) -> bool:
    return isinstance(error, ReadOnlyError | NoPermissionError)
