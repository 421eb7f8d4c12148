"""``up``, ``api``, ``worker``, ``courier``: the verbs that start rooms."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import re
import sys

from headrace import rooms
from headrace.settings import SettingError
from headrace.up import House, Ready, Terminal, check_before_start
from headrace.verbs.verb import OK, Invocation, Verb

MODEL_SETTINGS = ("model", "revision", "dtype", "kv_dtype", "device", "engine")
ENGINE_SETTINGS = (*MODEL_SETTINGS, "vllm_args", "kv_memory", "max_model_len", "max_running", "step_tokens", "threads")
WORKER_SETTINGS = (
    *ENGINE_SETTINGS,
    *("drain_seconds", "stall_seconds", "lease_seconds", "grace_seconds", "tick_seconds"),
    *("publish_seconds", "publish_unread_seconds", "resume_wait_seconds", "instant_step_ms", "log_level"),
)
API_SETTINGS = (
    *("host", "port", "api_key", "api_key_file", "allow_origin", "durability", "max_queued"),
    *("max_body_bytes", "max_wait_seconds", "result_ttl_seconds", "predict_wait_seconds"),
    *("max_streams", "heartbeat_seconds", "webhook_hosts", "webhook_private_hosts"),
)
COURIER_SETTINGS = ("webhook_secret", "webhook_secret_file", "webhook_timeout_seconds", "webhook_retry_seconds")
#: What Valkey says whatever its log level, and nobody has to act on.
CHATTER = re.compile("Reading config from stdin|Memory overcommit|Received SIGTERM|is now ready to exit")
COLOURS = {"headrace": 1, "valkey": 35, "api": 36, "worker": 32, "courier": 34}


def up(invocation: Invocation) -> int:
    """Start everything, and stay until it is told to stop."""
    settings = check_before_start(invocation.settings)
    quiet = settings.log_level in ("warning", "error")

    def log(name: str, line: str) -> None:
        if quiet and name == "valkey" and CHATTER.search(line):
            return
        print(_prefixed(name, line), file=sys.stderr, flush=True)

    def note(line: str) -> None:
        if not quiet:
            log("headrace", line)

    def ready(is_ready: Ready) -> None:
        invocation.print(dataclasses.asdict(is_ready), _announcement(is_ready))

    terminal = Terminal(log=log, note=note, ready=ready)
    asyncio.run(House(settings, invocation.environ, terminal).run())
    return OK


def api(invocation: Invocation) -> int:
    """Become the API."""
    invocation.settings.refuse_open_door()
    return _become(invocation, "api")


def worker(invocation: Invocation) -> int:
    """Become a worker's parent, or ask whether there is one."""
    return _become(invocation, "worker.health" if invocation.arguments.check else "worker")


def courier(invocation: Invocation) -> int:
    """Become a courier."""
    return _become(invocation, "courier")


def _add_worker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="start nothing: exit 0 if a worker of this host is alive")


def _become(invocation: Invocation, room: str) -> int:
    """Replace this process by a room, so that signals and exit code are the room's own."""
    settings = invocation.settings
    if not settings.redis_url:
        raise SettingError(f"headrace {room} needs a Redis: set REDIS_URL or --redis-url (headrace up brings its own)")
    if invocation.json:
        print(json.dumps({"room": room, "pid": os.getpid(), "settings": settings.to_public()}), flush=True)
    argv = rooms.command(room)
    os.execve(argv[0], argv, rooms.environment(settings, invocation.environ))


def _prefixed(name: str, line: str) -> str:
    if not sys.stderr.isatty():
        return f"{name:<9}| {line}"
    return f"\x1b[{COLOURS.get(name.partition('-')[0], 0)}m{name:<9}|\x1b[0m {line}"


def _announcement(ready: Ready) -> str:
    lines = [
        f"Headrace is ready at {ready.url}",
        f"  model   {ready.model}, {ready.workers} worker{'s' if ready.workers > 1 else ''}",
        '  try     headrace run "Why is the sky blue?"',
    ]
    if ready.redis_url:
        lines.append(f"  rq      rq info --url {ready.redis_url}")
    return "\n".join([*lines, "  stop    Ctrl-C: running jobs finish; again: they are handed back"])


UP = Verb(
    name="up",
    text="start everything here: embedded Valkey, API and workers, in one terminal",
    example="headrace up --port 8000 --workers 2 --model smollm2-135m --data-dir ./queue",
    settings=("data_dir", "redis_url", "workers", *API_SETTINGS, *COURIER_SETTINGS, *WORKER_SETTINGS),
    run=up,
)
API = Verb(
    name="api",
    text="start the HTTP API alone, for a Redis of your own",
    example="REDIS_URL=redis://127.0.0.1:6379 headrace api --port 8000",
    settings=("redis_url", *API_SETTINGS, "log_level"),
    run=api,
)
WORKER = Verb(
    name="worker",
    text="start one worker, for a Redis of your own",
    example="REDIS_URL=redis://127.0.0.1:6379 headrace worker --model ./my-model --dtype bfloat16",
    settings=("redis_url", "workers", "worker_index", "worker_name", "durability", *WORKER_SETTINGS),
    run=worker,
    add=_add_worker,
)
COURIER = Verb(
    name="courier",
    text="start a courier, which delivers callbacks (webhooks), for a Redis of your own",
    example="REDIS_URL=redis://127.0.0.1:6379 headrace courier --webhook-hosts example.com --webhook-secret-file f",
    settings=("redis_url", "webhook_hosts", "webhook_private_hosts", *COURIER_SETTINGS, "log_level"),
    run=courier,
)
