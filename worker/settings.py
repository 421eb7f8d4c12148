"""What a worker can be told, checked once. The values come from ``HEADRACE_<NAME>`` through ``jobs.settings``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from jobs.settings import DURABILITIES

ENGINES = ("torch", "instant", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "int8")
KV_DTYPES = ("auto", "model", "int8")
DEVICES = ("auto", "cpu", "cuda")
LOG_LEVELS = ("debug", "info", "warning", "error")
MOST_VLLM_ARGS = 4_096  #: characters


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One worker: its engine, its times, its place on the host.

    Raises:
        ValueError: naming the field and the value.
    """

    engine: str = "torch"  #: "instant" needs no model and no torch; "vllm" is an extra of its own
    model: str = "smollm2-135m"
    revision: str = ""
    dtype: str = "auto"
    kv_dtype: str = "auto"  #: of keys and values
    device: str = "auto"
    kv_memory: str = "auto"  #: "auto", or bytes such as "2GiB"
    max_model_len: int = 0  #: tokens; 0: the model's own
    max_running: int = 32  #: sequences in the engine at once
    step_tokens: int = 256  #: token budget of a step
    instant_step_ms: float = 0.0
    vllm_args: str = ""  #: more for the vllm engine, see ``read_vllm_args``
    durability: str = "fsync"  #: what the server must be able to promise
    workers: int = 1  #: at least so many share this host
    worker_index: int = 0  #: takes card ``index mod cards``
    worker_name: str = ""  #: the parent makes one up for each process it starts
    threads: int = 0  #: 0: this host's cores divided by its workers
    lease_seconds: float = 10.0  #: a worker silent for so long is taken for dead
    publish_seconds: float = 0.04  #: between two reports of tokens, while there are more to compute; 0: after each step
    publish_unread_seconds: float = 5.0  #: the same of jobs that nobody reads along, never less
    tick_seconds: float = 2.0  #: between two looks for dead workers, deadlines and retries
    drain_seconds: float = 25.0  #: to finish what runs after SIGTERM
    stall_seconds: int = 120  #: a process whose loop gives no sign for so long is killed; 0: never
    log_level: str = "info"
    hf_token: str = field(default="", repr=False)  #: for the hub

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, ENGINES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
        _one_of("device", self.device, DEVICES)
        _one_of("durability", self.durability, DURABILITIES)
        _one_of("log_level", self.log_level, LOG_LEVELS)
        read_vllm_args(self.vllm_args)
        if self.vllm_args and self.engine != "vllm":
            raise ValueError(f"vllm_args: is for engine vllm, and this is {self.engine}")
        if self.kv_dtype != "auto" and self.engine == "vllm":
            raise ValueError("kv_dtype: is for engine torch; vLLM takes vllm_args kv_cache_dtype=fp8")
        for name, low in _LEAST.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}: must be at least {low:g}, not {getattr(self, name)!r}")
        for name, high in _MOST.items():
            if not getattr(self, name) <= high:
                raise ValueError(f"{name}: must be at most {high:g}, not {getattr(self, name)!r}")

    @property
    def beat_seconds(self) -> float:
        """Between two renewals of the lease: three tries fit into one."""
        return min(2.0, self.lease_seconds / 3)


_LEAST = {
    "max_model_len": 0,
    "max_running": 1,
    "step_tokens": 1,
    "instant_step_ms": 0,
    "workers": 1,
    "worker_index": 0,
    "threads": 0,
    "lease_seconds": 0.1,
    "publish_seconds": 0,
    "publish_unread_seconds": 0,
    "tick_seconds": 0.01,
    "drain_seconds": 0,
    "stall_seconds": 0,
}
_MOST = {"publish_seconds": 60, "publish_unread_seconds": 60, "stall_seconds": 86_400}


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: must be one of {', '.join(known)}, not {value!r}")


def read_vllm_args(text: str) -> dict[str, Any]:
    """Arguments by name, from a JSON object or from ``name=value name=value`` with values in JSON where they are JSON.

    Raises:
        ValueError: naming the field.
    """
    if len(text) > MOST_VLLM_ARGS:
        raise ValueError(f"vllm_args: must be at most {MOST_VLLM_ARGS} characters")
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise ValueError(f"vllm_args: is no JSON object: {error}") from error
    args = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise ValueError(f"vllm_args: must be a JSON object or name=value name=value, not {word!r:.80}")
        args[name] = _as_json(value)
    return args


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
