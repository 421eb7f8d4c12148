"""What a worker can be told, checked once. The values come from ``HEADRACE_<NAME>`` through ``jobs.settings``."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.settings import DURABILITIES

ENGINES = ("torch", "instant")
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
LOG_LEVELS = ("debug", "info", "warning", "error")
LONGEST_STALL = 86_400  #: seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One worker: its engine, its times, its place on the host.

    Raises:
        ValueError: naming the field and the value.
    """

    engine: str = "torch"  #: "instant" needs no model and no torch
    model: str = "smollm2-135m"
    revision: str = ""
    dtype: str = "auto"
    device: str = "auto"
    kv_memory: str = "auto"  #: "auto", or bytes such as "2GiB"
    max_model_len: int = 0  #: tokens; 0: the model's own
    max_running: int = 32  #: sequences in the engine at once
    step_tokens: int = 256  #: token budget of a step
    instant_step_ms: float = 0.0
    durability: str = "fsync"  #: what the server must be able to promise
    workers: int = 1  #: at least so many share this host
    worker_index: int = 0  #: takes card ``index mod cards``
    worker_name: str = ""  #: the parent makes one up for each process it starts
    threads: int = 0  #: 0: this host's cores divided by its workers
    lease_seconds: float = 10.0  #: a worker silent for so long is taken for dead
    tick_seconds: float = 2.0  #: between two looks for dead workers, deadlines and retries
    drain_seconds: float = 25.0  #: to finish what runs after SIGTERM
    stall_seconds: int = 120  #: a process whose loop gives no sign for so long is killed; 0: never
    log_level: str = "info"
    hf_token: str = field(default="", repr=False)  #: for the hub

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, ENGINES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, DEVICES)
        _one_of("durability", self.durability, DURABILITIES)
        _one_of("log_level", self.log_level, LOG_LEVELS)
        for name, low in _LEAST.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}: must be at least {low:g}, not {getattr(self, name)!r}")
        if self.stall_seconds > LONGEST_STALL:
            raise ValueError(f"stall_seconds: must be at most {LONGEST_STALL}, not {self.stall_seconds!r}")

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
    "tick_seconds": 0.01,
    "drain_seconds": 0,
    "stall_seconds": 0,
}


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: must be one of {', '.join(known)}, not {value!r}")
