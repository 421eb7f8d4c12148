"""What a courier can be told, checked once. The values come from ``HEADRACE_<NAME>`` through ``jobs.settings``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from courier.signing import read_secrets
from jobs.webhooks import AllowedHosts

LOG_LEVELS = ("debug", "info", "warning", "error")
SCHEDULE = "5,300,1800,7200,18000,36000,50400,72000,86400"  #: seconds behind each attempt: ten of them in three days
LONGEST_PAUSE_SECONDS = 604_800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CourierSettings:
    """Whom to call, how to sign, and how long to go on.

    Raises:
        ValueError: naming the field, and never showing a secret.
    """

    webhook_hosts: str = ""  #: who may be called back; see ``jobs.webhooks``
    webhook_private_hosts: str = ""  #: the same, where names may lead to addresses that are not public
    webhook_secret: str = field(default="", repr=False)  #: ``whsec_…``; with spaces between, several: each signs
    webhook_secret_file: str = ""  #: holds them; read once, when ``webhook_secret`` is empty
    webhook_timeout_seconds: float = 10.0  #: of one attempt, from the look-up of the name to the answer
    webhook_retry_seconds: str = SCHEDULE  #: pauses behind a failed attempt; after the last one it is given up
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ValueError("webhook_hosts: must list who may be called back")
        if not 0.01 <= self.webhook_timeout_seconds <= 60:
            raise ValueError(f"webhook_timeout_seconds: must be from 0.01 to 60, not {self.webhook_timeout_seconds!r}")
        if not all(0 <= pause <= LONGEST_PAUSE_SECONDS for pause in self.pauses):
            raise ValueError(f"webhook_retry_seconds: must be at most {LONGEST_PAUSE_SECONDS:g} each")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"log_level: must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}")

    @property
    def hosts(self) -> AllowedHosts:
        return AllowedHosts(self.webhook_hosts, self.webhook_private_hosts)

    @property
    def pauses(self) -> tuple[float, ...]:
        """Seconds behind the first attempt, the second …"""
        try:
            return tuple(float(pause) for pause in self.webhook_retry_seconds.split(","))
        except ValueError:
            raise ValueError("webhook_retry_seconds: must be seconds with commas between") from None

    def read_secrets(self) -> tuple[bytes, ...]:
        """The keys to sign with.

        Raises:
            ValueError: there is none, the file cannot be read, or one is no secret.
        """
        text = self.webhook_secret
        if not text and self.webhook_secret_file:
            try:
                text = Path(self.webhook_secret_file).expanduser().read_text(encoding="ascii")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"webhook_secret_file: {self.webhook_secret_file!r} cannot be read: {type(error).__name__}"
                ) from None
        return read_secrets(text)
