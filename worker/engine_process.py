"""The engine process: loads one engine, meets Redis, runs the loop. Imports torch only for an engine that needs it."""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from core.errors import StoreUnavailable
from core.instant import InstantConfig, InstantEngine
from core.protocol import EngineProtocol
from jobs.connection import connect
from jobs.lookout import Lookout
from jobs.settings import SettingError, StoreSettings
from jobs.store import Store, WorkerCard
from worker.cores import CoreShare, read_boot_id
from worker.loop import Worker
from worker.outage import Pace
from worker.presence import Presence
from worker.pulse import Pulse
from worker.rq_worker import RqWorker
from worker.settings import WorkerSettings, read_vllm_args
from worker.stop import Stop
from worker.talk import Talk
from worker.upkeep import Upkeep

if TYPE_CHECKING:
    from core.engine import EngineConfig

log = logging.getLogger("headrace.worker")

KNOCK_SECONDS = 0.5  #: between two tries to reach Redis at the start
YOUNG = 20_000  #: new objects before Python looks for cycles among them


def serve(settings: WorkerSettings, store_settings: StoreSettings, pulse: Pulse) -> None:
    """Run one worker until it is told to stop; the first sign of life comes with the first round of its loop.

    Raises:
        ModelError, SettingError, UnsafeServer: this configuration can never run.
        StoreUnavailable: Redis was away when we had to leave.
    """
    store, stop = Store.connect(store_settings), Stop(settings.drain_seconds)
    patiently(store.inspect, stop)
    share = divide_cores(settings, store)
    patiently(share.adjust, stop)
    engine = load(settings, share.threads)
    stop.listen()
    gc.freeze()  # as in the API: what is here stays, and most of what is young is soon gone without being looked for
    gc.set_threshold(YOUNG)
    build(settings, store_settings, engine, stop, pulse).run()


def load(settings: WorkerSettings, threads: int) -> EngineProtocol:
    """The engine that the settings name.

    Raises:
        ModelError, SettingError: it cannot be served.
    """
    if settings.engine == "instant":
        seconds = settings.instant_step_ms / 1000
        return InstantEngine(InstantConfig(step_seconds=seconds, max_running=settings.max_running))
    if settings.engine == "vllm":
        return _load_vllm(settings)
    from core.engine import Engine

    return Engine.load(_configure(settings, threads))


def build(
    settings: WorkerSettings,
    store_settings: StoreSettings,
    engine: EngineProtocol,
    stop: Stop,
    pulse: Pulse | None = None,
) -> Worker:
    """A worker, registered as soon as Redis is there."""
    store, name = Store.connect(store_settings), settings.worker_name
    card = WorkerCard(name=name, host=socket.gethostname(), pid=os.getpid(), model=engine.card, boot_id=read_boot_id())
    stop.wake_with(store.interrupt)
    rq = RqWorker(name, connect(store_settings.redis_url), stop.request)
    presence = Presence(card, store, rq, pulse or Pulse(), settings.beat_seconds)
    patiently(presence.arrive, stop)
    log.info("worker %s serves %s", name, engine.card.name)
    upkeep = Upkeep(store, divide_cores(settings, store), settings.tick_seconds)
    talk = Talk(store, presence, upkeep, engine.card, Lookout(store_settings.redis_url, engine.card))
    pace = Pace(settings.publish_seconds, settings.publish_unread_seconds, time.monotonic)
    return Worker(engine, talk, presence, stop, pace, ThreadPoolExecutor(1, "talk"))


def divide_cores(settings: WorkerSettings, store: Store) -> CoreShare:
    """This worker's share of its host's cores."""

    def read_others() -> list[str]:
        return [card.boot_id for card in store.workers() if card.name != settings.worker_name]

    return CoreShare(read_others, least=settings.workers, fixed=settings.threads)


def patiently(call: Callable[[], object], stop: Stop) -> None:
    """Do it as soon as Redis is there, unless we are told to stop before."""
    while not stop.requested:
        try:
            call()
        except StoreUnavailable as error:
            log.warning("%s; trying again", error)
            time.sleep(KNOCK_SECONDS)
        else:
            return


def _configure(settings: WorkerSettings, threads: int) -> EngineConfig:
    """What the torch engine is told; worker i takes card i mod N."""
    import torch

    from core.engine import EngineConfig

    cards = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if settings.device == "cuda" and not cards:
        raise SettingError("HEADRACE_DEVICE: is cuda, and torch finds no card here")
    try:
        return EngineConfig(
            model=settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            kv_dtype=settings.kv_dtype,
            device=f"cuda:{settings.worker_index % cards}" if cards else settings.device,
            kv_memory=settings.kv_memory,
            max_model_len=settings.max_model_len,
            max_running=settings.max_running,
            step_tokens=settings.step_tokens,
            threads=threads,
            hf_token=settings.hf_token,
        )
    except ValueError as error:
        raise SettingError(f"the engine's settings: {error}") from error


def _load_vllm(settings: WorkerSettings) -> EngineProtocol:
    """vLLM sees to threads and cards itself."""
    try:
        from core.vllm_engine import VllmConfig, VllmEngine
    except ImportError as error:
        raise SettingError(f"HEADRACE_ENGINE: is vllm, and vLLM cannot be imported here: {error}") from error
    try:
        config = VllmConfig(
            model=settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            device=settings.device,
            kv_memory=settings.kv_memory,
            max_model_len=settings.max_model_len,
            max_running=settings.max_running,
            step_tokens=settings.step_tokens,
            hf_token=settings.hf_token,
            args=read_vllm_args(settings.vllm_args),
        )
    except ValueError as error:
        raise SettingError(f"the engine's settings: {error}") from error
    return VllmEngine.load(config)
