"""``headrace up`` and the verbs that talk to it, as processes: what a person sees, types and kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import redis

from headrace.client import Client
from tests.conftest import Server
from tests.courier_world import SECRET, Receiver, receiving, verify
from tests.processes import clean_environment, free_port, has_ended, until, workers

SLOW = ("--instant-step-ms", "50")


@dataclass(slots=True)
class Up:
    """A running ``headrace up --json``."""

    process: subprocess.Popen[str]
    url: str
    redis_url: str
    log: Path

    def stop(self, *numbers: signal.Signals) -> int:
        for number in numbers or (signal.SIGINT,):
            self.process.send_signal(number)
        return self.process.wait(30)

    def room_pids(self, room: str) -> list[int]:
        """Processes below this one whose command line names a room."""
        return [pid for pid in descendants(self.process.pid) if room in command_line(pid)]


def descendants(pid: int) -> list[int]:
    """Every process below one."""
    below: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        below.setdefault(parent, []).append(int(folder.name))
    found, wave = [], below.get(pid, [])
    while wave:
        found += wave
        wave = [child for one in wave for child in below.get(one, [])]
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def another(up: Up, room: str, old: int) -> bool:
    """The room has a process other than the one that was killed."""
    return bool(set(up.room_pids(room)) - {old})


@contextmanager
def started(folder: Path, *flags: str, **environ: str) -> Iterator[Up]:
    """``up`` with the instant engine on a free port, ready; killed at the end if it still runs."""
    argv = [sys.executable, "-m", "headrace", "up", "--json", "--engine", "instant", "--port", "0"]
    argv += ["--data-dir", str(folder / "queue"), *flags]
    log = folder / "up.log"
    with (
        log.open("a") as err,
        subprocess.Popen(
            argv, cwd=folder, env=clean_environment(**environ), stdout=subprocess.PIPE, stderr=err, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            ready = json.loads(line)
            yield Up(process=process, url=ready["url"], redis_url=ready["redis_url"], log=log)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """Whom ``up`` may call back."""
    with receiving() as one:
        yield one


@pytest.fixture(scope="module")
def up(receiver: Receiver) -> Iterator[Up]:
    """One for every test that leaves it as it was."""
    flags, secret = ("--webhook-private-hosts", receiver.host), {"HEADRACE_WEBHOOK_SECRET": SECRET}
    with tempfile.TemporaryDirectory(prefix="hr-up-") as name, started(Path(name), *flags, **secret) as one:
        yield one
        assert one.stop() == 0
        assert SECRET not in one.log.read_text()


def headrace(*words: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "headrace", *words]
    environment = clean_environment(**environ)
    return subprocess.run(argv, env=environment, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_submitted_lines_are_jobs_that_wait_and_status_follow(up: Up, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\n")
    submitted = headrace("submit", "--file", str(tmp_path / "prompts.txt"), "--max-tokens", "4", "--url", up.url)
    ids = submitted.stdout.split()
    waited = headrace("wait", "-", "--timeout", "30", "--json", stdin=submitted.stdout, HEADRACE_URL=up.url)
    jobs = [json.loads(line) for line in waited.stdout.splitlines()]

    assert (submitted.returncode, waited.returncode, len(ids)) == (0, 0, 3)
    assert [job["id"] for job in jobs] == ids
    assert [len(job["result"]["choices"][0]["token_ids"]) for job in jobs] == [4, 4, 4]
    shown = headrace("status", ids[0], "--url", up.url)
    assert shown.stdout.startswith(f"{ids[0]} succeeded: w")


def test_a_webhook_is_told_of_the_end_and_again_when_asked(up: Up, receiver: Receiver) -> None:
    job_id = headrace("submit", "hello", "--webhook", receiver.url(), "--max-tokens", "5", HEADRACE_URL=up.url).stdout
    until(lambda: receiver.got, up.process)
    again = headrace("resend", job_id.strip(), HEADRACE_URL=up.url)
    first, second = until(lambda: len(receiver.got) == 2 and receiver.got, up.process)
    with Client(up.url) as client:
        shown = until(lambda: (client.get(job_id.strip()).webhook or {}).get("state") == "delivered", up.process)

    assert shown
    assert (again.returncode, again.stdout.split()[:2]) == (0, [job_id.strip(), "succeeded:"])
    assert verify(first)
    assert verify(second)
    assert (first.id, first.body) == (second.id, second.body)
    assert (first.event["type"], first.event["data"]) == ("job.succeeded", {"id": job_id.strip()})


def test_jsonl_lines_may_be_prompts_chats_or_whole_jobs(up: Up) -> None:
    lines = [
        {"prompt": "a", "max_tokens": 2, "priority": -3},
        {"messages": [{"role": "user", "content": "b"}], "max_tokens": 3, "metadata": {"n": "1"}},
        {"kind": "generate", "input": {"prompt": "c"}, "params": {"max_tokens": 4}},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    submitted = headrace("submit", "--file", "-", "--url", up.url, stdin=text)
    urgent = headrace("submit", "--priority", "-7", "d", "--url", up.url)
    with Client(up.url) as client:
        jobs = [client.wait(job_id, 30) for job_id in submitted.stdout.split()]
        priorities = [job.priority for job in (*jobs, client.get(urgent.stdout.strip()))]

    assert [len(job.token_ids) for job in jobs] == [2, 3, 4]
    assert jobs[1].wire["metadata"] == {"n": "1"}
    assert priorities == [-3, 0, 0, -7]


def test_run_shows_every_answer_that_was_asked_for(up: Up) -> None:
    shown = headrace("run", "hello", "--max-tokens", "9", "--n", "3", "--url", up.url)
    whole = headrace("run", "hello", "--max-tokens", "9", "--n", "3", "--json", "--url", up.url)
    texts = [choice["text"] for choice in json.loads(whole.stdout)["result"]["choices"]]

    assert len({*texts}) == 3
    assert shown.stdout == "\n\n".join(texts) + "\n"


def test_run_streams_the_same_text_that_is_the_result(up: Up) -> None:
    streamed = headrace("run", "hello", "--max-tokens", "9", "--url", up.url)
    whole = headrace("run", "hello", "--max-tokens", "9", "--json", "--url", up.url)

    assert (streamed.returncode, whole.returncode) == (0, 0)
    assert streamed.stdout == json.loads(whole.stdout)["result"]["choices"][0]["text"] + "\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["wait", "job_nobody"], 2, "no job 'job_nobody'"),
        (["submit", "hello", "--max-tokens", "0"], 2, "params.max_tokens"),
        (["submit", "hello", "--model", "nobody"], 2, "nobody"),
        (["submit", "hello", "--priority", "-101"], 2, "priority: must be from -100 to 100"),
        (["run", "!fail", "--raw"], 1, "failed"),
    ],
)
def test_what_the_server_refuses_or_fails_has_its_exit_code(up: Up, words: list[str], code: int, said: str) -> None:
    done = headrace(*words, "--url", up.url)

    assert (done.returncode, done.stdout.strip()) == (code, "")
    assert said in done.stderr


def test_a_failed_job_is_waited_for_with_exit_code_1_and_errors_are_json_on_demand(up: Up) -> None:
    job_id = headrace("submit", "!fail", "--url", up.url).stdout.strip()
    waited = headrace("wait", job_id, "--url", up.url)
    missing = headrace("wait", "job_nobody", "--url", up.url, "--json")

    assert waited.returncode == 1
    assert f"{job_id} failed: " in waited.stdout
    assert json.loads(missing.stderr)["error"]["code"] == "job_not_found"


def test_nobody_there_is_exit_code_3() -> None:
    done = headrace("status", "--url", f"http://127.0.0.1:{free_port()}")

    assert done.returncode == 3
    assert "no Headrace server answers" in done.stderr


def test_the_server_is_shown_with_its_workers_and_models(up: Up) -> None:
    status = json.loads(headrace("status", "--json", "--url", up.url).stdout)
    listed = headrace("workers", "--url", up.url)
    models = headrace("models", "--url", up.url)

    assert (status["ready"], status["durability"], len(status["workers"])) == (True, "fsync", 1)
    assert status["workers"][0]["name"] in listed.stdout
    assert len(models.stdout.splitlines()) == 1


def test_the_address_for_rq_s_tools_works(up: Up) -> None:
    with redis.Redis.from_url(up.redis_url) as client:
        assert client.scard("rq:workers") == 1


def test_waiting_ends_with_exit_code_5_and_a_cancelled_job_keeps_what_it_has(tmp_path: Path) -> None:
    with started(tmp_path, *SLOW) as up:
        job_id = headrace("submit", "long", "--max-tokens", "2000", "--url", up.url).stdout.strip()
        late = headrace("wait", job_id, "--timeout", "0.3", "--url", up.url)
        with Client(up.url) as client:
            until(lambda: client.get(job_id).tokens_generated > 0, up.process)
            cancelled = headrace("cancel", job_id, "--url", up.url)
            job = client.wait(job_id, 30)
        code = up.stop(signal.SIGTERM)

    assert (late.returncode, cancelled.returncode, code) == (5, 0, 0)
    assert (job.status, job.finish_reason) == ("cancelled", "cancelled")


def test_everything_that_is_killed_comes_back_and_no_job_is_lost(tmp_path: Path) -> None:
    quick = ("--lease-seconds", "2", "--grace-seconds", "0.2", "--tick-seconds", "0.2")
    with started(tmp_path, "--instant-step-ms", "10", "--workers", "2", *quick) as up, Client(up.url) as client:
        ids = [client.submit(f"job {n}", max_tokens=100).id for n in range(8)]
        for room in ("valkey-server", "-m worker", "-m api"):
            old = up.room_pids(room)[0]
            os.kill(old, signal.SIGKILL)
            until(partial(another, up, room, old), up.process)
            assert client.run("are you back?", timeout=30, max_tokens=1).succeeded
        jobs = [client.wait(job_id, 60) for job_id in ids]
        code = up.stop()

    assert [(job.status, len(job.token_ids)) for job in jobs] == [("succeeded", 100)] * 8
    assert code == 0


def test_ctrl_c_finishes_what_runs_and_keeps_what_waits(tmp_path: Path) -> None:
    with started(tmp_path, *SLOW, "--max-running", "2") as up, Client(up.url) as client:
        ids = [client.submit(f"job {n}", max_tokens=20).id for n in range(6)]
        until(lambda: client.get(ids[1]).tokens_generated > 0, up.process)
        below = descendants(up.process.pid)
        code = up.stop()
        assert all(has_ended(pid) for pid in below)
    with started(tmp_path) as up, Client(up.url) as client:
        jobs = [client.wait(job_id, 30) for job_id in ids]
        second = up.stop()

    assert (code, second) == (0, 0)
    assert [job.status for job in jobs] == ["succeeded"] * 6
    assert [job.attempt for job in jobs[:2]] == [1, 1]


def test_a_second_ctrl_c_hands_running_jobs_back_at_once(tmp_path: Path) -> None:
    with started(tmp_path, *SLOW, "--drain-seconds", "600") as up, Client(up.url) as client:
        job_id = client.submit("long", max_tokens=800).id
        until(lambda: client.get(job_id).tokens_generated > 0, up.process)
        up.process.send_signal(signal.SIGINT)
        until(lambda: "draining" in up.log.read_text(), up.process)
        until(lambda: workers(up.url) and workers(up.url)[0]["state"] == "draining", up.process)
        code = up.stop()
    with started(tmp_path) as up, Client(up.url) as client:
        job = client.wait(job_id, 30)
        up.stop()

    assert code == 0
    assert (job.status, job.attempt, len(job.token_ids)) == ("succeeded", 2, 800)


def test_a_killed_up_leaves_no_process_behind_and_its_successor_goes_on(tmp_path: Path) -> None:
    # whether the worker can hand its job back before Valkey has ended is a race; if not, its lease has to run out
    quick = ("--lease-seconds", "1", "--grace-seconds", "0.2", "--tick-seconds", "0.2")
    with started(tmp_path, *SLOW, *quick) as up, Client(up.url) as client:
        job_id = client.submit("long", max_tokens=100).id
        until(lambda: client.get(job_id).tokens_generated > 0, up.process)
        below = descendants(up.process.pid)
        up.process.kill()
        up.process.wait()
        until(lambda: all(has_ended(pid) for pid in below))
    with started(tmp_path, *quick) as up, Client(up.url) as client:
        job = client.wait(job_id, 60)
        assert up.stop() == 0

    assert len(below) >= 4
    assert (job.status, len(job.token_ids)) == ("succeeded", 100)


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = headrace("up", "--port", port, "--data-dir", str(tmp_path / "queue"))

    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert not (tmp_path / "queue").exists()


def test_a_folder_in_use_is_said_and_nothing_is_left_running(tmp_path: Path) -> None:
    from headrace.embedded import DataFolder

    other = DataFolder.open(tmp_path / "queue")
    done = headrace("up", "--port", "0", "--engine", "instant", "--data-dir", str(tmp_path / "queue"))
    other.close()

    assert done.returncode == 2
    assert "is in use by another headrace" in done.stderr


def test_a_redis_that_cannot_keep_the_promise_stops_everything_with_exit_code_2(own_valkey: Server) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        client.config_set("appendonly", "no")
    done = headrace("up", "--port", "0", "--engine", "instant", REDIS_URL=own_valkey.url)

    assert done.returncode == 2
    assert "appendonly" in done.stderr


def test_with_redis_url_no_server_of_our_own_is_started(own_valkey: Server, tmp_path: Path) -> None:
    with started(tmp_path, REDIS_URL=own_valkey.url) as up, Client(up.url) as client:
        assert client.run("hello", timeout=30, max_tokens=2).succeeded
        assert up.room_pids("valkey-server") == []
        assert up.room_pids("-m courier") == []  # nobody may be called back
        assert up.stop() == 0
    assert not (tmp_path / "queue").exists()


def test_a_key_is_wanted_by_the_api_and_sent_by_the_client(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk_test\n")
    with started(tmp_path, "--api-key-file", "key") as up:
        refused = headrace("submit", "hello", "--url", up.url)
        taken = headrace("submit", "hello", "--url", up.url, "--api-key-file", str(tmp_path / "key"))
        assert up.stop() == 0

    assert (refused.returncode, taken.returncode) == (2, 0)
    assert "401" in refused.stderr
    assert "sk_test" not in (tmp_path / "up.log").read_text()


def test_run_brings_its_own_server_when_none_is_up() -> None:
    before = set(Path(tempfile.gettempdir()).glob("headrace-*"))
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("something listens on port 8000 here")
    done = headrace("run", "hello", "--max-tokens", "5", "--engine", "instant")

    assert done.returncode == 0, done.stderr
    assert "starting a private one" in done.stderr
    assert len(done.stdout.split()) == 5
    assert set(Path(tempfile.gettempdir()).glob("headrace-*")) <= before


def test_the_demo_answers_every_job_in_batches_and_writes_it_down(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    done = headrace("demo", "--engine", "instant", "--instant-step-ms", "10", "--output", str(path))
    report = json.loads(path.read_text())

    assert done.returncode == 0, done.stderr
    assert len(report["jobs"]) == 36
    assert all(job["status"] == "succeeded" and job["token_ids"] for job in report["jobs"])
    assert {"prompt", "messages"} & set(report["jobs"][0])
    assert report["mean_decode_batch"] >= 8
    assert report["weights"]
    steps = sum(report["decode_rows"].values())
    tokens = sum(int(rows) * n for rows, n in report["decode_rows"].items())
    assert report["mean_decode_batch"] == pytest.approx(tokens / steps)
    assert tokens >= report["completion_tokens"] > 1000
    assert "36 of 36 done" in done.stdout
