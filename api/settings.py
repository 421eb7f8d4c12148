"""What the API may be told, checked once. Knows no environment: ``jobs.settings.from_environ`` reads that."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from jobs.settings import DURABILITIES
from jobs.webhooks import AllowedHosts

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Settings of one API process; field ``foo_bar`` is ``HEADRACE_FOO_BAR``.

    Raises:
        ValueError: a value is out of its bound, or the address is not loopback and there is no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = field(default="", repr=False)  #: empty: open, on loopback only
    api_key_file: str = ""  #: holds the key; read once, when ``api_key`` is empty
    allow_origin: str = ""  #: origins a browser may call from, comma separated
    model: str = "smollm2-135m"  #: the server's own model: known even before a worker is alive
    durability: str = "fsync"
    max_body_bytes: int = 8_388_608
    max_wait_seconds: float = 60.0  #: the longest ``?wait=`` and ``Prefer: wait=``
    predict_wait_seconds: float = 60.0  #: how long ``/predict`` holds a request before it answers 504
    result_ttl_seconds: int = 86_400
    max_streams: int = 1_000  #: event streams and held requests of this process at once
    heartbeat_seconds: float = 15.0  #: the longest silence on an event stream
    webhook_hosts: str = ""  #: who may be called back; see ``jobs.webhooks``
    webhook_private_hosts: str = ""
    log_level: str = "info"

    def __post_init__(self) -> None:
        self.hosts  # noqa: B018  # an entry that is none shows now
        self._check("port", 0, 65_535)
        self._check("max_body_bytes", 1_024, 1_073_741_824)
        self._check("max_wait_seconds", 0, 3_600)
        self._check("predict_wait_seconds", 0, 3_600)
        self._check("result_ttl_seconds", 1, 315_360_000)
        self._check("max_streams", 1, 100_000)
        self._check("heartbeat_seconds", 0.01, 3_600)
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"log_level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}")
        if self.durability not in DURABILITIES:
            raise ValueError(f"durability must be one of {', '.join(DURABILITIES)}, not {self.durability!r}")
        if not self.on_loopback and not self.api_key and not self.api_key_file:
            raise ValueError(
                f"host {self.host!r} can be reached from other machines: "
                f"set api_key_file (or api_key), or listen on 127.0.0.1"
            )

    def _check(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low:g} to {high:g}, not {value:g}")

    @property
    def on_loopback(self) -> bool:
        """Nobody outside this host can reach ``host``."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def origins(self) -> tuple[str, ...]:
        """``allow_origin``, taken apart."""
        return tuple(origin.strip().rstrip("/") for origin in self.allow_origin.split(",") if origin.strip())

    @property
    def hosts(self) -> AllowedHosts:
        """Who may be called back."""
        return AllowedHosts(self.webhook_hosts, self.webhook_private_hosts)

    def read_key(self) -> str:
        """The key clients must send; empty when there is none.

        Raises:
            ValueError: the key's file cannot be read, or the key is empty or not one line of visible ASCII.
        """
        if not self.api_key and not self.api_key_file:
            return ""
        key = self.api_key or self._read_key_file()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("the API key must be one line of visible ASCII characters")  # without showing it
        return key

    def _read_key_file(self) -> str:
        try:
            return Path(self.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"api_key_file {self.api_key_file!r} cannot be read: {type(error).__name__}") from error
