"""Every setting of Headrace: its name, default, bound and meaning. Knows nothing of where a value comes from.

``headrace.layers`` reads flags, environment and file into a ``Settings``; ``to_environment`` hands it on to the rooms.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PREFIX = "HEADRACE_"

#: Variables of ours that are no setting: other rooms read them themselves.
ROOM_VARIABLES = ("HEADRACE_CACHE",)

#: Variables that others set too, and the setting each one fills where ``HEADRACE_<NAME>`` does not.
BORROWED: Mapping[str, str] = {"REDIS_URL": "redis_url", "HF_TOKEN": "hf_token"}


#: Settings that nobody is shown.
SECRETS = ("api_key", "hf_token", "webhook_secret")


class SettingError(ValueError):
    """A setting has a value it cannot have, or a name nobody knows; the message says which and where it came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What one setting may be, and what it is for."""

    text: str  #: one line of help
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    pattern: str = ""  #: a regular expression for the whole text; empty: anything
    shape: str = ""  #: the pattern in words

    def check(self, name: str, value: object) -> None:
        """Raise ``SettingError`` naming the setting, its bound and the value."""
        if self.choices and value not in self.choices:
            raise SettingError(f"{name} must be one of {', '.join(self.choices)}, not {value!r}")
        if isinstance(value, int | float) and not self.low <= value <= self.high:
            raise SettingError(f"{name} must be from {self.low:g} to {self.high:g}, not {value:g}")
        if self.pattern and not re.fullmatch(self.pattern, str(value)):
            raise SettingError(f"{name} must be {self.shape}")  # without the value: an address may hold a password


def _setting(default: Any, text: str, low: float = -math.inf, high: float = math.inf, **rest: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(text=text, low=low, high=high, **rest)})


_SIZE: Mapping[str, Any] = {
    "pattern": r"auto|[0-9]+(\.[0-9]+)?\s*([KMGTkmgt]?i?[Bb]?)",
    "shape": "auto or a size such as 2GiB",
}
_URL: Mapping[str, Any] = {"pattern": r"https?://.+", "shape": "an address that starts with http:// or https://"}
_REDIS: Mapping[str, Any] = {
    "pattern": r"((rediss?|unix)://.+)?",
    "shape": "an address that starts with redis://, rediss:// or unix://",
}
_VLLM_ARGS: Mapping[str, Any] = {"pattern": r"(?s:.{0,4096})", "shape": "at most 4096 characters"}
_NAME: Mapping[str, Any] = {"pattern": r".+", "shape": "a name"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings; empty text means "not set".

    Raises:
        SettingError: a value is out of its bound.
    """

    url: str = _setting("http://127.0.0.1:8000", "the server that client verbs talk to", **_URL)
    redis_url: str = _setting("", "use this Redis or Valkey (7.2 or newer) instead of an embedded one", **_REDIS)
    host: str = _setting("127.0.0.1", "address the API listens on; anything but loopback needs an API key", **_NAME)
    port: int = _setting(8000, "port the API listens on; 0 picks a free one", 0, 65_535)
    api_key: str = _setting("", "the key clients must send; prefer api_key_file, which no process list shows")
    api_key_file: str = _setting("", "file that holds the key")
    allow_origin: str = _setting("", "origins a browser may call from, comma separated")
    workers: int = _setting(1, "worker processes on this host", 1, 1_024)
    model: str = _setting("smollm2-135m", "alias, folder, or name on the hub", **_NAME)
    revision: str = _setting("", "revision of a hub model")
    dtype: str = _setting("auto", "numbers the model computes in", choices=("auto", "float32", "bfloat16", "int8"))
    kv_dtype: str = _setting(
        "auto", "keys and values: int8, or as the model; auto: int8 with dtype int8", choices=("auto", "model", "int8")
    )
    device: str = _setting("auto", "where it computes", choices=("auto", "cpu", "cuda"))
    engine: str = _setting(
        "torch", "instant: no model, for tests; vllm: many cards", choices=("torch", "instant", "vllm")
    )
    vllm_args: str = _setting("", "more for engine vllm: a JSON object, or name=value name=value", **_VLLM_ARGS)
    data_dir: str = _setting("~/.local/share/headrace", "folder of the embedded Valkey: the queue lives here")
    durability: str = _setting(
        "fsync", "a 202 means: on a replica's disk too, on disk, or in memory", choices=("replica", "fsync", "memory")
    )
    kv_memory: str = _setting("auto", "memory for keys and values per worker: auto, or a size such as 2GiB", **_SIZE)
    max_model_len: int = _setting(0, "longest prompt and answer in tokens; 0 takes the model's own", 0, 10_000_000)
    max_running: int = _setting(32, "sequences in one engine at once: one for each choice of a job", 1, 65_536)
    step_tokens: int = _setting(256, "tokens computed in one step", 1, 1_048_576)
    threads: int = _setting(0, "threads per worker; 0 divides the cores among the workers", 0, 4_096)
    worker_index: int = _setting(0, "takes card index modulo cards", 0, 65_535)
    worker_name: str = _setting("", "name of a worker; made up when empty")
    lease_seconds: float = _setting(10.0, "a worker that is silent for so long has lost its jobs", 0.1, 3_600)
    grace_seconds: float = _setting(8.0, "how long a reaped job waits for a late result", 0, 3_600)
    publish_seconds: float = _setting(0.04, "shortest time between two reports of tokens; 0: each step", 0, 60)
    publish_unread_seconds: float = _setting(5.0, "the same of jobs that nobody reads along, never less", 0, 60)
    tick_seconds: float = _setting(2.0, "time between two looks for lost jobs", 0.05, 600)
    drain_seconds: float = _setting(25.0, "time to finish running jobs when told to stop", 0, 86_400)
    resume_wait_seconds: float = _setting(
        3_600.0, "how long a begun answer waits for an engine of the kind that began it", 0, 2_592_000
    )
    stall_seconds: int = _setting(120, "a worker whose loop hangs for so long is killed; 0: never", 0, 86_400)
    max_queued: int = _setting(2_000_000, "a longer queue answers 429", 1, 1_000_000_000)
    max_body_bytes: int = _setting(8_388_608, "largest request body", 1_024, 1_073_741_824)
    max_wait_seconds: float = _setting(60.0, "longest a request may wait for its job", 0, 3_600)
    predict_wait_seconds: float = _setting(60.0, "how long /predict waits before it answers 504", 0, 3_600)
    max_streams: int = _setting(1_000, "event streams and waiting requests of one API process", 1, 100_000)
    heartbeat_seconds: float = _setting(15.0, "longest silence on an event stream", 0.01, 3_600)
    result_ttl_seconds: int = _setting(86_400, "how long results are kept", 1, 315_360_000)
    webhook_hosts: str = _setting("", "hosts that may be called back, comma separated: host, host:port; empty: none")
    webhook_private_hosts: str = _setting("", "the same for hosts whose addresses are not public")
    webhook_secret: str = _setting("", "what callbacks are signed with (whsec_…); prefer webhook_secret_file")
    webhook_secret_file: str = _setting("", "file that holds it; several with spaces between all sign")
    webhook_timeout_seconds: float = _setting(10.0, "time for one attempt at a callback", 0.01, 60)
    webhook_retry_seconds: str = _setting(
        "5,300,1800,7200,18000,36000,50400,72000,86400", "pauses behind failed attempts; then it is given up"
    )
    instant_step_ms: float = _setting(0.0, "milliseconds a step of the instant engine takes", 0, 60_000)
    log_level: str = _setting("info", "how much is logged", choices=("debug", "info", "warning", "error"))
    hf_token: str = _setting("", "token for the hub (HF_TOKEN is read too)")

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            rule.check(name, getattr(self, name))

    @property
    def data_folder(self) -> Path:
        """``data_dir``, absolute."""
        return Path(self.data_dir).expanduser().absolute()

    @property
    def on_loopback(self) -> bool:
        """Nobody outside this host can reach ``host``."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def calls_back(self) -> bool:
        """Somebody may be called back, so that a courier is needed."""
        return bool(self.webhook_hosts or self.webhook_private_hosts)

    def read_api_key(self) -> str:
        """The key itself, from the setting or its file; empty when there is none.

        Raises:
            SettingError: the file cannot be read or is empty.
        """
        if self.api_key or not self.api_key_file:
            return self.api_key
        try:
            key = Path(self.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"api_key_file {self.api_key_file} cannot be read: {error}") from error
        if not key:
            raise SettingError(f"api_key_file {self.api_key_file} is empty")
        return key

    def refuse_open_door(self) -> None:
        """Raise ``SettingError`` when others could reach an API that asks for no key."""
        if not self.on_loopback and not self.read_api_key():
            raise SettingError(
                f"host {self.host} can be reached from outside and no API key is set: "
                "set HEADRACE_API_KEY or --api-key-file FILE, or listen on 127.0.0.1"
            )

    def to_environment(self) -> dict[str, str]:
        """What a room is started with: every setting that has a value, as ``HEADRACE_<NAME>``."""
        values = {name: _as_text(getattr(self, name)) for name in RULES}
        return {PREFIX + name.upper(): value for name, value in values.items() if value}

    def to_public(self) -> dict[str, str]:
        """The settings for a person's eyes: without secrets and the address's password."""
        values = {name: _as_text(getattr(self, name)) for name in RULES if name not in SECRETS}
        return {**values, "redis_url": re.sub(r"//[^@/]*@", "//***@", values["redis_url"].split("?")[0])}


RULES: Mapping[str, Rule] = {f.name: f.metadata["rule"] for f in dataclasses.fields(Settings)}
TYPES: Mapping[str, type] = {f.name: type(f.default) for f in dataclasses.fields(Settings)}


def _as_text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
