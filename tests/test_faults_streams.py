"""One stream, read through every fault there is: frame by frame what the job's log says afterwards."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import redis

from tests.api_world import front
from tests.conftest import Server
from tests.faults_world import crew, kill_holders, restart, restartable
from tests.jobs_world import audit
from tests.processes import free_port
from tests.test_faults_api import api_process
from tests.worker_world import answer

CUT_SECONDS = 0.3
PARAMS: dict[str, Any] = {"max_tokens": 180, "temperature": 1, "seed": 5, "stop": ["never said"]}
BODY = {"kind": "generate", "input": {"prompt": "a long story"}, "params": PARAMS}


def read_frames(url: str, job_id: str, after: int, seconds: float | None) -> Iterator[str]:
    """The frames of one connection as they are on the wire, comments left out; it is cut off after ``seconds``."""
    headers = {} if after < 0 else {"Last-Event-ID": str(after)}
    ends_at = None if seconds is None else time.monotonic() + seconds
    left = b""
    with httpx2.stream("GET", f"{url}/v1/jobs/{job_id}/events", headers=headers, timeout=10) as stream:
        if not stream.is_success:
            stream.read()
            raise httpx2.ReadError(f"status {stream.status_code}")
        for piece in stream.iter_bytes():
            *whole, left = (left + piece).split(b"\n\n")
            yield from (frame.decode() for frame in whole if not frame.startswith(b":"))
            if ends_at is not None and time.monotonic() > ends_at:
                return


def follow(urls: Callable[[], str], job_id: str) -> tuple[list[str], int]:
    """Every frame of a job, read by a client that is cut again and again; and how many connections that took."""
    frames: list[str] = []
    deadline = time.monotonic() + 40
    for connections in itertools.count(1):
        assert time.monotonic() < deadline, f"{len(frames)} frames, then nothing"
        after = number_of(frames[-1]) if frames else -1
        try:
            for frame in read_frames(urls(), job_id, after, CUT_SECONDS):
                frames.append(frame)
                if "\nevent: finished\n" in frame:
                    return frames, connections
        except httpx2.TransportError:
            time.sleep(0.05)  # nobody is there; the next one may be
    raise AssertionError("unreachable")


def number_of(frame: str) -> int:
    return int(frame.split("\n")[0].removeprefix("id: "))


def text_of(frames: list[str]) -> str:
    """The texts of the token events, joined."""
    parts = [frame.split("\n") for frame in frames]
    return "".join(json.loads(data[6:])["text"] for _, event, data in parts if event == "event: token")


def check(frames: list[str], url: str, job_id: str, client: redis.Redis) -> None:
    """The same frames as one undisturbed read of the log gives, and the text of an undisturbed run."""
    again = list(read_frames(url, job_id, -1, None))
    assert frames == again
    assert [number_of(frame) for frame in frames] == list(range(len(frames)))
    expected = answer("a long story", **PARAMS)["choices"][0]["text"]
    assert text_of(frames) == expected
    job = json.loads(frames[-1].split("\n")[2][6:])["job"]
    assert (job["status"], job["result"]["choices"][0]["text"]) == ("succeeded", expected)
    assert sum("\nevent: started\n" in frame for frame in frames) == job["attempt"]
    assert audit(client) == []


def submit(url: str) -> str:
    job_id: str = httpx2.post(f"{url}/v1/jobs", json=BODY, timeout=20).json()["id"]
    return job_id


def kill_twice(client: redis.Redis) -> threading.Thread:
    """The worker that holds the job dies, and so does its successor."""
    thread = threading.Thread(target=lambda: kill_holders(client, seed=3, times=2, pause_seconds=0.8))
    thread.start()
    return thread


def test_a_stream_cut_every_300_ms_while_its_worker_is_killed_twice_is_the_log_frame_by_frame(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        stack.enter_context(crew(valkey_url, tmp_path, 2, instant_step_ms=10))
        urls = [str(stack.enter_context(front(valkey_url)).base_url) for _ in range(2)]
        job_id = submit(urls[0])
        killing = kill_twice(valkey)
        turns = itertools.cycle(urls)  # each connection at the next replica
        frames, connections = follow(lambda: next(turns), job_id)
        killing.join()
        check(frames, urls[0], job_id, valkey)

    assert connections > 5
    assert sum("\nevent: started\n" in frame for frame in frames) == 3


def test_a_stream_goes_on_behind_an_api_that_was_killed_and_came_back(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with crew(valkey_url, tmp_path, 2, instant_step_ms=10), ExitStack() as stack:
        first = stack.enter_context(api_process(valkey_url, port))
        job_id = submit(url)
        killing = kill_twice(valkey)

        def come_back() -> None:
            time.sleep(0.7)
            first.kill()
            first.wait()
            stack.enter_context(api_process(valkey_url, port))

        restarting = threading.Thread(target=come_back)
        restarting.start()
        frames, _ = follow(lambda: url, job_id)
        killing.join()
        restarting.join()
        check(frames, url, job_id, valkey)

    assert first.returncode == -9


def test_a_stream_goes_on_behind_a_server_that_was_killed_and_came_back(own_valkey: Server, tmp_path: Path) -> None:
    with (
        crew(own_valkey.url, tmp_path, 2, instant_step_ms=10),
        restartable(own_valkey) as servers,
        front(own_valkey.url) as api,
        redis.Redis.from_url(own_valkey.url) as client,
    ):
        url = str(api.base_url)
        job_id = submit(url)

        def come_back() -> None:
            time.sleep(0.7)
            servers.append(restart(servers[-1]))
            kill_holders(client, seed=3, times=2, pause_seconds=0.6)

        restarting = threading.Thread(target=come_back)
        restarting.start()
        frames, _ = follow(lambda: url, job_id)
        restarting.join()
        check(frames, url, job_id, client)

    assert servers[0].process.returncode == -9
