"""The whole house as processes: ``headrace up``, HTTP in front, real Valkey, real signals, real weights."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from rq.job import Job
from rq.serializers import JSONSerializer

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class House:
    """A running ``headrace up``."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> Any:
        answer = httpx2.get(f"{self.url}{path}", timeout=90)
        answer.raise_for_status()
        return answer.json()

    def redis_url(self) -> str:
        """As ``up`` prints it for RQ's own tools."""
        found = re.search(r"(unix://\S+|redis://\S+)", self.log.read_text())
        assert found, self.log.read_text()
        return found[1]


def start_house(folder: Path, *flags: str, seconds: float = 120) -> House:
    """Start ``headrace up`` on a free port and wait until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "up.log"
    command = [sys.executable, "-m", "headrace", "up", "--port", str(port), "--data-dir", str(folder / "state")]
    with log.open("ab") as out:
        process = subprocess.Popen([*command, *flags], stdout=out, stderr=out, cwd=folder, env=environment())
    house = House(url=f"http://127.0.0.1:{port}", process=process, log=log)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(f"{house.url}/ready", timeout=5).status_code == 200:
                return house
        except httpx2.HTTPError:
            pass
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"headrace up was not ready: {log.read_text()[-3000:]}")


def stop_house(house: House) -> int:
    """Stop it as Ctrl-C does and give its exit code."""
    house.process.send_signal(signal.SIGINT)
    return house.process.wait(60)


def environment() -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_") or name.endswith("CACHE")
    }
    return {**kept, "PYTHONPATH": str(ROOT), "REDIS_URL": ""}


@pytest.fixture(scope="module")
def instant() -> Iterator[House]:
    """Two workers on the instant engine."""
    with tempfile.TemporaryDirectory(prefix="hr-e2e-") as name:
        house = start_house(Path(name), "--engine", "instant", "--workers", "2", "--instant-step-ms", "20")
        yield house
        assert stop_house(house) == 0


@pytest.fixture(scope="module")
def real() -> Iterator[House]:
    """One worker on the real weights, in float32."""
    with tempfile.TemporaryDirectory(prefix="hr-e2e-") as name:
        house = start_house(Path(name), "--dtype", "float32", seconds=170)
        yield house
        assert stop_house(house) == 0


def body(n: int, **params: Any) -> dict[str, Any]:
    return {"kind": "generate", "input": {"prompt": f"job number {n}"}, "params": {"max_tokens": 1 + n % 60, **params}}


def submit(house: House, wire: dict[str, Any]) -> str:
    answer = httpx2.post(f"{house.url}/v1/jobs", json=wire, timeout=30)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def finished(house: House, job_id: str, *, seconds: float = 90) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job: dict[str, Any] = house.get(f"/v1/jobs/{job_id}?wait=30")
        if job["status"] not in ("queued", "running"):
            return job
    raise AssertionError(f"{job_id} is still {job['status']}")


def read_stream(house: House, job_id: str, after: int | None = None) -> list[tuple[int, str, dict[str, Any]]]:
    """Every event from ``after`` to the end."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    events, fields = [], {}
    with httpx2.stream("GET", f"{house.url}/v1/jobs/{job_id}/events", headers=headers, timeout=90) as answer:
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name in ("id", "event", "data"):
                fields[name] = value
            elif not line and "data" in fields:
                events.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
                fields = {}
    return events


def engine_processes(house: House) -> list[int]:
    return [worker["pid"] for worker in house.get("/v1/workers")["data"]]


def test_two_hundred_mixed_jobs_survive_the_kill_of_a_worker_each_with_one_result(instant: House) -> None:
    with ThreadPoolExecutor(16) as pool:
        ids = list(pool.map(lambda n: submit(instant, body(n, temperature=n % 2 / 2, seed=n)), range(200)))
        while len(instant.get("/v1/jobs?status=succeeded&limit=100")["data"]) < 60:
            time.sleep(0.02)
        kill_a_busy_worker(instant)
        jobs = list(pool.map(lambda job_id: finished(instant, job_id), ids))

    assert {job["status"] for job in jobs} == {"succeeded"}
    assert [job["result"]["usage"]["completion_tokens"] for job in jobs] == [1 + n % 60 for n in range(200)]
    connection = redis.Redis.from_url(instant.redis_url())
    for job in jobs:
        assert connection.xlen(f"rq:results:{job['id']}") == 1
    assert any(job["attempt"] > 1 for job in jobs), "the kill hit no running job: the test proved nothing"


def kill_a_busy_worker(house: House) -> None:
    running = house.get("/v1/jobs?status=running&limit=1")["data"]
    assert running, "nothing ran any more: the test proves nothing"
    kill(house, running[0]["worker"])


def kill(house: House, name: str) -> None:
    [pid] = [worker["pid"] for worker in house.get("/v1/workers")["data"] if worker["name"] == name]
    os.kill(pid, signal.SIGKILL)


def test_a_stream_across_a_worker_kill_has_no_hole_and_no_repeat(instant: House) -> None:
    job_id = submit(instant, {"kind": "generate", "input": {"prompt": "long"}, "params": {"max_tokens": 400}})
    killer = threading.Timer(0.8, lambda: kill(instant, instant.get(f"/v1/jobs/{job_id}")["worker"]))
    killer.start()

    events = read_stream(instant, job_id)

    killer.join()
    assert [number for number, _, _ in events] == list(range(len(events)))
    assert [kind for _, kind, _ in events].count("started") == 2
    job = events[-1][2]["job"]
    assert "".join(data["text"] for _, kind, data in events if kind == "token") == job["result"]["choices"][0]["text"]
    assert read_stream(instant, job_id, after=10) == events[11:]


def test_a_job_put_in_by_a_program_that_has_only_rq_runs_in_our_batch(instant: House) -> None:
    program = """
import sys, time, redis, rq
from rq.serializers import JSONSerializer
c = redis.Redis.from_url(sys.argv[1])
q = rq.Queue("generate", connection=c, serializer=JSONSerializer)
print(q.enqueue("headrace.generate", {"input": {"prompt": "Once upon"}, "params": {"max_tokens": 5}}).id)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, instant.redis_url()], capture_output=True, text=True, check=True, timeout=30
    )
    job_id = run.stdout.strip()

    job = finished(instant, job_id)

    assert job["status"] == "succeeded"
    connection = redis.Redis.from_url(instant.redis_url())
    value = Job.fetch(job_id, connection=connection, serializer=JSONSerializer).return_value()
    [choice] = job["result"]["choices"]
    assert value["usage"] == job["result"]["usage"]
    assert value["choices"] == [{name: choice[name] for name in ("index", "text", "finish_reason")}]


def test_the_queue_outlives_the_whole_house() -> None:
    with tempfile.TemporaryDirectory(prefix="hr-e2e-") as name:
        times = ("--lease-seconds", "2", "--grace-seconds", "1", "--tick-seconds", "0.5")
        first = start_house(Path(name), "--engine", "instant", "--instant-step-ms", "20", *times)
        ids = [submit(first, body(59)) for _ in range(40)]
        pids = engine_processes(first)
        first.process.kill()
        first.process.wait(10)
        for pid in pids:
            await_death(pid)
        second = start_house(Path(name), "--engine", "instant", *times)
        jobs = [finished(second, job_id) for job_id in ids]

        assert {job["status"] for job in jobs} == {"succeeded"}
        assert stop_house(second) == 0


def await_death(pid: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} outlived its parent"
        time.sleep(0.05)


@pytest.mark.weights
@pytest.mark.slow
def test_the_real_model_answers_what_plain_transformers_computes(real: House) -> None:
    from core.models.source import resolve

    questions = ["What is the capital of France?", "Name three colours.", "Write one sentence about the sea.", "2+2?"]
    bodies: list[dict[str, Any]] = [
        {
            "kind": "generate",
            "input": {"messages": [{"role": "user", "content": question}]},
            "params": {"max_tokens": 24},
        }
        for question in questions
    ]
    jobs = [finished(real, job_id) for job_id in [submit(real, wire) for wire in bodies]]

    assert "Paris" in jobs[0]["result"]["choices"][0]["text"]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for wire, job in zip(bodies, jobs, strict=True):
        prompt = tokenizer.apply_chat_template(wire["input"]["messages"], add_generation_prompt=True, return_dict=True)
        ids = torch.tensor([prompt["input_ids"]])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert job["result"]["choices"][0]["token_ids"] == expected[0, ids.shape[1] :].tolist()


@pytest.mark.weights
@pytest.mark.slow
def test_predict_continues_the_raw_text(real: House) -> None:
    answer = httpx2.post(f"{real.url}/predict", json={"input_text": "Once upon"}, timeout=90)

    assert answer.status_code == 200
    assert len(answer.json()["output_text"]) > 20


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)


def test_the_curl_examples_of_the_readme_work(instant: House) -> None:
    blocks = readme_blocks("bash curl")

    assert len(blocks) == 2
    for block in blocks:
        command = block.replace("http://127.0.0.1:8000", instant.url)
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
        answer = json.loads(run.stdout)
        assert answer.get("output_text") or answer["status"] == "succeeded", answer


def test_the_python_examples_of_the_readme_work(instant: House) -> None:
    client, rq_only = readme_blocks("python")

    for program in (client, f"REDIS_URL = {instant.redis_url()!r}\n{rq_only}\nprint(job.id)"):
        program = program.replace("http://127.0.0.1:8000", instant.url)
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd="/", env=environment()
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip()
