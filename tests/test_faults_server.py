"""A Valkey that dies, is away, forgets, refuses or is full, while workers are busy and clients submit."""

from __future__ import annotations

import contextlib
import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import redis

from tests.api_world import front
from tests.conftest import Server, start_valkey
from tests.faults_world import TIMES, Asked, Meanwhile, ask, restart, restartable, running, undisturbed
from tests.processes import until
from tests.worker_world import eventually, worker

FULL = 32  #: jobs in one engine


def full_batch(client: redis.Redis, log: Path, *, least: int = 70, most: int = 110) -> list[Asked]:
    """A whole batch that runs, and half of one that waits."""
    asked = ask(client, FULL + FULL // 2, least=least, most=most)
    eventually(lambda: running(asked[:FULL]), "tokens", log)
    return asked


def test_a_server_that_is_killed_three_times_under_full_batches_loses_nothing(
    own_valkey: Server, tmp_path: Path
) -> None:
    with (
        restartable(own_valkey) as servers,
        worker(own_valkey.url, tmp_path, **TIMES, instant_step_ms=3) as process,
        redis.Redis.from_url(own_valkey.url) as client,
    ):
        pid = process.engine_pid()
        asked = full_batch(client, process.log)
        for _ in range(3):
            servers.append(restart(servers[-1]))
            time.sleep(0.2)
        undisturbed(asked, client, process.log)

        assert process.engine_pid() == pid
        assert sum(each.attempt for each in asked) < 2 * len(asked)


def submit(api: httpx2.Client, job_id: str) -> httpx2.Response:
    body = {"kind": "generate", "input": {"prompt": job_id}, "params": {"max_tokens": 5}}
    return api.put(f"/v1/jobs/{job_id}", json=body)


@pytest.mark.parametrize("lease_seconds", [6.0, 0.4])
def test_while_the_server_is_away_workers_compute_on_and_the_api_says_so(
    own_valkey: Server, tmp_path: Path, lease_seconds: float
) -> None:
    times = {**TIMES, "lease_seconds": lease_seconds, "instant_step_ms": 3}
    with (
        restartable(own_valkey) as servers,
        worker(own_valkey.url, tmp_path, **times) as process,
        front(own_valkey.url) as api,
        redis.Redis.from_url(own_valkey.url) as client,
    ):
        asked = full_batch(client, process.log)
        own_valkey.process.kill()
        own_valkey.process.wait(10)
        start = time.monotonic()
        answer = submit(api, "x")
        ready = api.get("/ready")
        seconds = time.monotonic() - start
        time.sleep(1.2)  # the outage itself: three of the short leases
        servers.append(start_valkey(own_valkey.folder))
        back = time.monotonic()
        until(lambda: api.get("/ready").status_code == 200)
        recovered = time.monotonic() - back
        undisturbed(asked, client, process.log)
        attempts = [each.attempt for each in asked]

    assert (answer.status_code, ready.status_code) == (503, 503)
    assert int(answer.headers["retry-after"]) >= 1
    assert seconds < 2  # two answers: a second each
    assert recovered < 2 + 1
    if lease_seconds > 2:
        assert attempts == [1] * len(asked)


# -- forgetful, deaf, read-only


def flush(client: redis.Redis) -> None:
    client.script_flush()


def hang_up(client: redis.Redis) -> None:
    client.client_kill_filter(_type="normal", skipme=True)
    client.client_kill_filter(_type="pubsub", skipme=True)


def fail_over(client: redis.Redis) -> None:
    """For a moment the server is somebody's replica: it answers READONLY."""
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    time.sleep(0.1)
    client.execute_command("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("spoil", [flush, hang_up, fail_over])
def test_a_server_that_forgets_or_hangs_up_or_fails_over_in_mid_run_is_outlived(
    own_valkey: Server, tmp_path: Path, spoil: Callable[[redis.Redis], None]
) -> None:
    acknowledged: list[str] = []
    numbers = itertools.count()
    patient = {**TIMES, "lease_seconds": 4.0}  # what a busy machine costs a worker is not asked here
    with (
        worker(own_valkey.url, tmp_path, **patient, instant_step_ms=3) as process,
        front(own_valkey.url) as api,
        redis.Redis.from_url(own_valkey.url) as client,
        redis.Redis.from_url(own_valkey.url) as saboteur,
    ):
        pid = process.engine_pid()

        def submit() -> None:
            job_id = f"s{next(numbers)}"
            answer = api.put(f"/v1/jobs/{job_id}", json={"kind": "generate", "input": {"prompt": "x"}})
            acknowledged.extend([job_id] * (answer.status_code in (200, 202)))

        asked = full_batch(client, process.log)
        with Meanwhile(submit, lambda: spoil(saboteur), pause_seconds=0.05) as meanwhile:
            eventually(lambda: min(meanwhile.rounds) >= 6, "rounds", process.log)
        for job_id in acknowledged:
            assert api.get(f"/v1/jobs/{job_id}?wait=20").json()["status"] == "succeeded"
        undisturbed(asked, client, process.log)
        assert process.engine_pid() == pid

    assert acknowledged
    most = 2 if spoil is hang_up else 1  # jobs of a claim whose answer was cut off are handed back
    assert max(each.attempt for each in asked) <= most


# -- full


@contextlib.contextmanager
def full_disk(server: Server) -> Iterator[None]:
    """The server's files may not grow: what it writes fails as on a disk without room."""
    pid, (soft, hard) = server.process.pid, resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    size = max(path.stat().st_size for path in server.folder.rglob("*.incr.aof"))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        yield
    finally:
        if server.process.poll() is None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def submit_until_refused(api: httpx2.Client) -> tuple[list[str], httpx2.Response]:
    """The ids of accepted jobs, and the first answer that was something else."""
    accepted: list[str] = []
    for n in range(2_000):
        answer = submit(api, f"d{n}")
        if answer.status_code != 202:
            return accepted, answer
        accepted.append(f"d{n}")
    raise AssertionError("the disk never filled up")


@contextlib.contextmanager
def serving(fsync: str) -> Iterator[list[Server]]:
    """A server of one's own; the last of the list is the one that runs."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        with restartable(start_valkey(Path(name), fsync=fsync)) as servers:
            yield servers
            servers[0].process.kill()
            servers[0].process.wait(10)


def test_a_full_disk_refuses_submissions_and_what_runs_ends_once_there_is_room_again(tmp_path: Path) -> None:
    with (
        serving("everysec") as servers,
        worker(servers[0].url, tmp_path, **TIMES, instant_step_ms=3) as process,
        front(servers[0].url) as api,
        redis.Redis.from_url(servers[0].url) as client,
    ):
        asked = full_batch(client, process.log)
        with full_disk(servers[0]):
            accepted, refused = submit_until_refused(api)
            time.sleep(0.5)
        start = time.monotonic()
        until(lambda: submit(api, "later").status_code in (200, 202))
        recovered = time.monotonic() - start
        undisturbed(asked, client, process.log)
        ends = {api.get(f"/v1/jobs/{job_id}?wait=20").json()["status"] for job_id in [*accepted, "later"]}

    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert recovered < 2 + 3
    assert ends == {"succeeded"}


def test_a_server_that_dies_of_a_full_disk_comes_back_with_everything_that_was_accepted(tmp_path: Path) -> None:
    with (
        serving("always") as servers,
        worker(servers[0].url, tmp_path, **TIMES, instant_step_ms=3) as process,
        front(servers[0].url) as api,
        redis.Redis.from_url(servers[0].url) as client,
    ):
        asked = full_batch(client, process.log)
        with full_disk(servers[0]):
            accepted, refused = submit_until_refused(api)
            servers[0].process.wait(10)
        servers.append(start_valkey(servers[0].folder))
        undisturbed(asked, client, process.log)
        ends = {api.get(f"/v1/jobs/{job_id}?wait=20").json()["status"] for job_id in accepted}

    assert refused.status_code == 503
    assert ends <= {"succeeded"}


def test_a_worker_that_dies_while_memory_is_full_has_a_successor_that_goes_on(
    own_valkey: Server, tmp_path: Path
) -> None:
    with (
        worker(own_valkey.url, tmp_path, **TIMES, instant_step_ms=3) as process,
        redis.Redis.from_url(own_valkey.url) as client,
    ):
        asked = full_batch(client, process.log, least=300, most=400)  # on a busy machine the shorter ones end before
        client.config_set("maxmemory", 1)
        process.kill_engine()
        undisturbed(asked, client, process.log)
        hidden = client.smembers("rq:workers")
        client.config_set("maxmemory", 0)
        eventually(lambda: client.smembers("rq:workers"), "registration with RQ", process.log)

    assert hidden == set()
    assert max(each.attempt for each in asked) == 2


def test_with_its_memory_full_the_server_takes_nothing_and_everything_that_runs_ends(
    own_valkey: Server, tmp_path: Path
) -> None:
    with (
        worker(own_valkey.url, tmp_path, **TIMES, instant_step_ms=3) as process,
        front(own_valkey.url) as api,
        redis.Redis.from_url(own_valkey.url) as client,
    ):
        asked = full_batch(client, process.log)
        client.config_set("maxmemory", 1)
        refused = submit(api, "late")
        undisturbed(asked, client, process.log)
        client.config_set("maxmemory", 0)
        eventually(lambda: submit(api, "late").status_code == 202, "room", seconds=5)  # it looks once a second
        end = api.get("/v1/jobs/late?wait=20").json()["status"]

    assert refused.status_code == 503
    assert refused.json()["error"]["code"] in ("store_full", "store_unavailable")  # ours, or Redis' own
    assert end == "succeeded"
