"""The two judged runs: kills at a fixed pace, and every single job compared with an undisturbed run."""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.chaos.faults import holders, kill_one_of, kill_valkey
from benchmarks.chaos.house import House, living, patiently
from benchmarks.chaos.load import PATIENT, answer
from core.request import Kind, Request
from headrace.client import Client
from headrace.errors import ClientError
from jobs import keys
from jobs.connection import connect
from tests.conftest import start_valkey
from tests.faults_world import Snapshots
from tests.jobs_world import audit

Report = tuple[list[str], list[str]]

INSTANT_JOBS, STEPS, KILL_SECONDS, SPAN_SECONDS = 1_500, 40, 0.7, 30.0
VALKEY_AT = (9.0, 20.0)  #: seconds after the start
TINY_JOBS, TINY_TOKENS, TINY_KILLS = 300, 80, 8
CLIENTS = 16
END_SECONDS = 300.0


def judge_instant(arguments: argparse.Namespace) -> Report:
    """1,500 jobs of 40 steps of 5 ms, spread over the 30 s in which a holder dies every 0.7 s."""
    chance, kills = random.Random(arguments.seed), list[str]()
    bodies = {f"judged-{n}": body(f"judged {arguments.seed} {n}", n) for n in range(INSTANT_JOBS)}

    def attack(house: House) -> None:
        start, valkey = time.monotonic(), list(VALKEY_AT)
        while (now := time.monotonic() - start) < SPAN_SECONDS:
            if valkey and now >= valkey[0]:
                valkey.pop(0)
                kill_valkey(house, chance)
                kills.append("Valkey")
            elif kill_one_of(house, holders(house), chance):
                kills.append("worker")
            time.sleep(max(0.0, start + now + KILL_SECONDS - time.monotonic()))

    flags = ("--engine", "instant", "--instant-step-ms", "5", "--workers", str(arguments.workers))
    with tempfile.TemporaryDirectory(prefix="hr-") as name, living(Path(name), *flags) as house:
        wires, violations = run(house, bodies, attack, SPAN_SECONDS - 2)
        violations += problems(house, bodies, wires)
    for job_id, wire in wires.items():
        asked = bodies[job_id]
        if wire["status"] == "succeeded" and text_of(wire) != answer(asked["input"]["prompt"], asked["params"]):
            violations.append(f"{job_id} says something else than an undisturbed run")
    return lines(wires, kills), violations


def judge_tiny(arguments: argparse.Namespace) -> Report:
    """300 jobs of a tiny random model in float32; 8 SIGKILLs, each of a worker that has published since its start."""
    from core.engine import Engine, EngineConfig
    from tests.tiny_models import VOCAB, make

    chance, kills = random.Random(arguments.seed), list[str]()
    bodies = {f"judged-{n}": token_body(n, VOCAB) for n in range(TINY_JOBS)}

    def attack(house: House) -> None:
        deadline = time.monotonic() + END_SECONDS
        while len(kills) < TINY_KILLS and time.monotonic() < deadline:
            spoken = published(house)
            if kill_one_of(house, (pid for pid in holders(house) if pid in spoken), chance):
                kills.append("worker")
            time.sleep(0.3)

    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        folder = Path(name)
        model = {"model": str(make("llama", folder / "llama").folder), "dtype": "float32", "kv_memory": "16MiB"}
        flags: tuple[str, ...] = ("--workers", str(arguments.workers), "--max-running", "8")
        flags += tuple(word for key, value in model.items() for word in (f"--{key.replace('_', '-')}", value))
        with living(folder, *flags) as house:
            wires, violations = run(house, bodies, attack, 0)
            violations += problems(house, bodies, wires)
        requests = [Request.from_wire(each, kind=Kind.GENERATE) for each in bodies.values()]
        undisturbed = Engine.load(EngineConfig(**model)).generate(requests)  # type: ignore[arg-type]
    for job_id, expected in zip(bodies, undisturbed, strict=True):
        if tokens_of(wires[job_id]) != list(expected.choices[0].token_ids):
            violations.append(f"{job_id} has other tokens than an undisturbed run")
    if len(kills) < TINY_KILLS:
        violations.append(f"only {len(kills)} kills: the jobs ended too soon")
    return lines(wires, kills), violations


def run(
    house: House, bodies: Mapping[str, dict[str, Any]], attack: Callable[[House], None], over_seconds: float
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Submit, attack meanwhile, and see every end: each job as the API shows it, and what went wrong."""
    start, violations = time.monotonic(), list[str]()
    attacking = threading.Thread(target=attack, args=(house,))

    def ask(client: Client, number: int, job_id: str) -> Mapping[str, Any]:
        time.sleep(max(0.0, start + over_seconds * number / len(bodies) - time.monotonic()))
        client.submit(bodies[job_id], job_id=job_id)
        return {}

    with Client(house.url, patience=PATIENT) as client, ThreadPoolExecutor(CLIENTS) as pool:
        attacking.start()
        list(pool.map(lambda each: ask(client, *each), enumerate(bodies)))
        attacking.join()
        wires = dict(zip(bodies, pool.map(lambda job_id: ended(client, job_id, violations), bodies), strict=True))
    return wires, violations


def ended(client: Client, job_id: str, violations: list[str]) -> Mapping[str, Any]:
    """The job's end, with its log."""
    try:
        wire = client.wait(job_id, END_SECONDS).wire
        log = list(client.events(job_id))
    except ClientError as error:
        violations.append(f"{job_id}: {error}")
        return {"status": "lost", "attempt": 0}
    whole = [event.number for event in log] == list(range(len(log)))
    if not whole or wire["status"] != "succeeded" or "".join(event.text for event in log) != text_of(wire):
        violations.append(f"{job_id} is {wire['status']}, its log {'whole' if whole else 'broken'}")
    return wire


def problems(house: House, bodies: Iterable[str], wires: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What an audit finds, and jobs that do not have exactly one result."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        server = start_valkey(Path(name), fsync="everysec")
        try:
            scratch: Any = patiently(Snapshots(house.redis, connect(server.url)).take)
            found = audit(scratch)
            found += [f"{job_id}: no one result" for job_id in bodies if scratch.xlen(f"{keys.RESULTS}{job_id}") != 1]
            scratch.close()
        finally:
            server.process.kill()
            server.process.wait()
    return found


def published(house: House) -> set[int]:
    """Engine processes that have published since they started, as their last beat told."""
    cards = patiently(house.engines, 5) or {}
    stats = {
        pid: patiently(lambda name=name: house.redis.hget(f"{keys.CARD}{name}", "stats")) for pid, name in cards.items()
    }
    return {pid for pid, each in stats.items() if each and b'"generated_tokens":0' not in each.replace(b" ", b"")}


def lines(wires: Mapping[str, Mapping[str, Any]], kills: list[str]) -> list[str]:
    attempts = [int(wire["attempt"] or 0) for wire in wires.values()]
    succeeded = sum(wire["status"] == "succeeded" for wire in wires.values())
    again = sum(attempt > 1 for attempt in attempts)
    return [
        f"{succeeded} of {len(wires)} jobs succeeded; {kills.count('worker')} SIGKILLs of workers that held jobs, "
        f"{kills.count('Valkey')} of Valkey; {again} jobs were begun again, the unluckiest ran {max(attempts)} times."
    ]


def body(prompt: str, n: int) -> dict[str, Any]:
    params = {"max_tokens": STEPS, "temperature": n % 2, "seed": n}
    return {"kind": "generate", "input": {"prompt": prompt}, "params": params}


def token_body(n: int, vocabulary: int) -> dict[str, Any]:
    params = {"max_tokens": TINY_TOKENS, "ignore_eos": True, "temperature": n % 2 * 0.9, "seed": n}
    prompt = [(7 * n + k) % vocabulary for k in range(1 + n % 20)]
    return {"kind": "generate", "input": {"prompt_token_ids": prompt}, "params": params}


def text_of(wire: Mapping[str, Any]) -> str:
    return str(((wire.get("result") or {}).get("choices") or [{}])[0].get("text") or "")


def tokens_of(wire: Mapping[str, Any]) -> list[int]:
    return list(((wire.get("result") or {}).get("choices") or [{}])[0].get("token_ids") or ())
