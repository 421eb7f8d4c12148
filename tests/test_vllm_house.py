"""vLLM's engine under the whole house: HTTP in front, a real Valkey, workers in vLLM's own environment, SIGKILL.

The oracle is the torch engine on the same weights, in float32: what is greedy must be equal token by token.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from core.engine import Engine, EngineConfig
from core.request import Choice, Request
from jobs import commands
from jobs.runner import Runner
from tests.api_world import front
from tests.conftest import start_valkey
from tests.faults_world import crew, holders
from tests.jobs_world import audit
from tests.test_faults_streams import number_of, read_frames, text_of
from tests.tiny_models import make_with_words
from tests.worker_world import environment, eventually

#: The tokens that workers have counted, and not none.
METRIC = re.compile(r"^headrace_tokens_generated\S* [1-9]", re.M)
PYTHON = os.environ.get("HEADRACE_VLLM_PYTHON", "")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: make test-vllm"),
    pytest.mark.timeout(1200),
]

#: Two engines that load side by side on two cores, on a machine that does other things too.
LOAD_SECONDS = 600


@dataclass(frozen=True, slots=True)
class VllmHouse:
    """An API, a Valkey and two workers with vLLM."""

    url: str  #: Valkey's
    api: httpx2.Client
    client: Any
    model: Path
    log: Path

    def submit(self, wire: dict[str, Any]) -> str:
        answer = self.api.post("/v1/jobs", json=wire)
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def finished(self, job_id: str) -> dict[str, Any]:
        def read() -> dict[str, Any] | None:
            job: dict[str, Any] = self.api.get(f"/v1/jobs/{job_id}?wait=5").json()
            return job if job["status"] not in ("queued", "running") else None

        found: dict[str, Any] = eventually(read, f"end of {job_id}", seconds=LOAD_SECONDS)
        return found

    def await_both(self) -> None:
        """One that was killed is there again: what loads takes the cores that a test counts on."""
        eventually(lambda: len(Runner(self.client, 1).run(commands.workers())) == 2, "both", seconds=LOAD_SECONDS)

    def kill_holder(self) -> None:
        """SIGKILL an engine process that has jobs."""
        pid = eventually(lambda: next(iter(holders(self.client)), 0), "a worker that holds jobs", seconds=LOAD_SECONDS)
        os.kill(pid, signal.SIGKILL)

    def undisturbed(self, wires: list[dict[str, Any]]) -> list[Choice]:
        """What our own engine says."""
        engine = Engine.load(EngineConfig(model=str(self.model), dtype="float32", threads=1))
        results = engine.generate([Request.from_wire(wire) for wire in wires])
        return [result.choices[0] for result in results]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmHouse]:
    folder = tmp_path_factory.mktemp("house")
    model = make_with_words(tmp_path_factory.mktemp("model"))
    settings = {
        "engine": "vllm",
        "model": str(model),
        "dtype": "float32",
        "kv_memory": "64MiB",
        "max_running": 4,
        "lease_seconds": 5,
        "vllm_args": "enforce_eager=true",
        "python": PYTHON,
        "load_seconds": LOAD_SECONDS,
    }
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        server = start_valkey(Path(name))
        # Comments on a silent stream come sooner than its reader gives up: while both load nothing else does.
        with crew(server.url, folder, 2, **settings), front(server.url, heartbeat_seconds=2) as api:
            client = redis.Redis.from_url(server.url)
            yield VllmHouse(url=server.url, api=api, client=client, model=model, log=folder)
            client.close()
        server.process.terminate()
        server.process.wait(10)


def body(n: int, **params: Any) -> dict[str, Any]:
    prompt = f"w{3 + n % 60} w{3 + n * 7 % 60} w{3 + n * 13 % 60}"
    return {
        "kind": "generate",
        "input": {"prompt": prompt},
        "params": {"max_tokens": 1 + n * 7 % 100, "ignore_eos": True, **params},
    }


def test_two_hundred_jobs_survive_the_kill_of_a_vllm_worker_each_with_one_result(house: VllmHouse) -> None:
    house.await_both()
    wires = [body(n, temperature=n % 2, seed=n) for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(house.submit, wires))
        eventually(
            lambda: len(house.api.get("/v1/jobs?status=succeeded&limit=100").json()["data"]) >= 60, seconds=LOAD_SECONDS
        )
        house.kill_holder()
        jobs = list(pool.map(house.finished, ids))

    assert {job["status"] for job in jobs} == {"succeeded"}
    assert [job["result"]["usage"]["completion_tokens"] for job in jobs] == [1 + n * 7 % 100 for n in range(200)]
    assert all(house.client.xlen(f"rq:results:{job_id}") == 1 for job_id in ids)
    assert any(job["attempt"] > 1 for job in jobs), "the kill hit no running job: the test proved nothing"
    greedy = [tuple(job["result"]["choices"][0]["token_ids"]) for job in jobs[::2]]
    assert greedy == [choice.token_ids for choice in house.undisturbed(wires[::2])]
    assert audit(house.client) == []


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_stream_across_the_kill_of_a_vllm_worker_has_no_hole_and_no_repeat(
    house: VllmHouse, temperature: float
) -> None:
    house.await_both()
    wire = body(5, max_tokens=240, temperature=temperature, seed=5, stop=["never said"])
    job_id = house.submit(wire)
    frames: list[str] = []
    for frame in read_frames(str(house.api.base_url), job_id, -1, None):
        frames.append(frame)
        if len(frames) == 30:
            house.kill_holder()

    job = house.finished(job_id)
    assert [number_of(frame) for frame in frames] == list(range(len(frames)))
    assert sum("\nevent: started\n" in frame for frame in frames) == 2, "the kill came too late"
    assert text_of(frames) == job["result"]["choices"][0]["text"]
    assert len(job["result"]["choices"][0]["token_ids"]) == 240
    assert list(read_frames(str(house.api.base_url), job_id, 20, None)) == frames[21:]
    if temperature == 0:
        assert text_of(frames) == house.undisturbed([wire])[0].text


def test_a_kind_that_vllm_has_not_is_refused_at_submission_by_name(house: VllmHouse) -> None:
    answer = house.api.post("/v1/jobs", json={"kind": "predict", "input": {"token_ids": [5, 6]}})

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "kind"


def test_a_worker_is_seen_with_vllms_version_and_counts_under_the_same_names(house: VllmHouse) -> None:
    house.finished(house.submit(body(3)))

    [model] = house.api.get("/v1/models").json()["data"]
    assert (model["engine"], model["kinds"]) == ("vllm", ["generate"])
    assert "+vllm." in model["version"]
    eventually(lambda: METRIC.search(house.api.get("/metrics").text), "tokens in the metrics")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ("tensor_paralel_size=2", r"vllm_args: vLLM \S+ has no argument 'tensor_paralel_size'"),
        ("max_num_seqs=3", "vllm_args: max_num_seqs is set by HEADRACE_MAX_RUNNING"),
        ("kv_cache_dtype=nonsense", "vLLM says: .*kv_cache_dtype|vLLM says: .*cache_dtype"),
    ],
)
def test_an_argument_that_vllm_does_not_take_ends_the_worker_with_2_and_its_name(
    house: VllmHouse, args: str, complaint: str
) -> None:
    environ = environment(house.url, engine="vllm", model=house.model, vllm_args=args)
    command = [PYTHON, "-P", "-m", "worker"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)

    assert done.returncode == 2, done.stderr[-4000:]
    assert re.search(complaint, done.stderr, flags=re.S), done.stderr[-4000:]
