"""RQ for real: a program that has only rq, RQ's command line and its dashboard, with a worker of ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import Any

import pytest
import redis
import rq
from rq.command import (
    send_command,
    send_kill_horse_command,
    send_shutdown_command,
    send_stop_execution_command,
    send_stop_job_command,
)
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from core.instant import InstantConfig, InstantEngine
from tests.conftest import Server, start_valkey
from tests.worker_world import await_status, eventually, put, working


def command_line(url: str, *arguments: str) -> str:
    """What ``rq …`` prints."""
    program = "from rq.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", program, arguments[0], "-u", url, *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return run.stdout


def test_a_program_that_has_only_rq_gets_its_result(valkey: redis.Redis, valkey_url: str) -> None:
    with working(valkey_url):
        job = put(valkey, "x", max_tokens=3)
        await_status(job, "finished")

    value = Job.fetch(job.id, connection=valkey, serializer=JSONSerializer).return_value()
    assert value["usage"]["completion_tokens"] == 3
    assert value["choices"][0]["finish_reason"] == "length"


def test_stock_cancel_and_stop_end_running_jobs_and_no_other(valkey: redis.Redis, valkey_url: str) -> None:
    with working(valkey_url, step_ms=10):
        jobs = [put(valkey, "abcd"[n], max_tokens=100 if n == 3 else 9000) for n in range(4)]
        for job in jobs:
            await_status(job, "started")
        jobs[0].cancel()
        send_stop_job_command(valkey, jobs[1].id, serializer=JSONSerializer)
        send_stop_execution_command(valkey, jobs[2].id, "1")
        send_command(valkey, "w1", "stop-execution", job_id=jobs[3].id, execution_id="2")  # not the one that runs
        ends = [await_status(job, "finished", "failed", "stopped", "canceled") for job in jobs]
        eventually(lambda: valkey.scard("headrace:held:w1") == 0)

    assert ends == ["canceled", "stopped", "stopped", "finished"]
    assert {job.id.encode() for job in jobs[1:3]} == set(valkey.zrange("rq:failed:generate", 0, -1))


def test_a_job_that_stock_rq_cancelled_leaves_the_engine(valkey: redis.Redis, valkey_url: str) -> None:
    engine = InstantEngine(InstantConfig(step_seconds=0.005))
    with working(valkey_url, engine):
        job = put(valkey, "a", max_tokens=9000)
        await_status(job, "started")
        job.cancel()
        eventually(lambda: engine.idle)

    assert engine.stats.generated_tokens < 9000


def test_a_queued_job_cancelled_by_stock_rq_never_runs(valkey: redis.Redis, valkey_url: str) -> None:
    job = put(valkey, "a")
    job.cancel()
    other = put(valkey, "b")
    with working(valkey_url):
        await_status(other, "finished")

    assert job.get_status(refresh=True) == "canceled"
    assert not valkey.exists(f"headrace:events:{job.id}")


@pytest.mark.parametrize("way", ["registry", "command line"])
def test_a_failed_job_requeued_by_stock_rq_runs_again(valkey: redis.Redis, valkey_url: str, way: str) -> None:
    with working(valkey_url):
        job = put(valkey, "!fail")
        await_status(job, "failed")
        first = valkey.hget(f"rq:job:{job.id}", "attempt")
        if way == "registry":
            FailedJobRegistry("generate", connection=valkey, serializer=JSONSerializer).requeue(job.id)
        else:
            command_line(valkey_url, "requeue", "-S", "rq.serializers.JSONSerializer", "--queue", "generate", job.id)
        eventually(lambda: valkey.hget(f"rq:job:{job.id}", "attempt") != first)
        assert await_status(job, "failed") == "failed"

    assert (first, valkey.hget(f"rq:job:{job.id}", "attempt")) == (b"1", b"2")
    assert "the prompt asked for a failure" in str(job.latest_result().exc_string)


def test_suspend_holds_before_the_first_claim_and_resume_goes_on(valkey: redis.Redis, valkey_url: str) -> None:
    command_line(valkey_url, "suspend")
    job = put(valkey, "a")
    with working(valkey_url):
        eventually(lambda: valkey.hget("rq:worker:w1", "state") == b"suspended")
        commands = valkey.info("stats")["total_commands_processed"]
        time.sleep(0.5)
        spent = valkey.info("stats")["total_commands_processed"] - commands
        status = job.get_status(refresh=True)
        command_line(valkey_url, "resume")
        assert await_status(job, "finished") == "finished"

    assert status == "queued"
    assert spent < 250, "a suspended worker spins"


def test_rq_info_lists_the_worker_and_what_it_does(valkey: redis.Redis, valkey_url: str) -> None:
    with working(valkey_url, step_ms=10):
        idle = command_line(valkey_url, "info", "--raw")
        put(valkey, "a", max_tokens=500)
        eventually(lambda: valkey.hget("rq:worker:w1", "state") == b"busy")
        busy = command_line(valkey_url, "info", "--raw")
    gone = command_line(valkey_url, "info", "--raw")

    assert re.search(r"worker w1 .* idle generate\. jobs: 0 finished, 0 failed", idle)
    assert re.search(r"worker w1 .* busy generate", busy)
    assert "w1" not in gone


def test_rq_info_counts_what_a_worker_has_done_also_after_rq_forgot_it(valkey: redis.Redis, valkey_url: str) -> None:
    with working(valkey_url, step_ms=2):
        await_status(put(valkey, "good", max_tokens=50), "finished")
        await_status(put(valkey, "bad", max_tokens=0), "failed")
        valkey.delete("rq:worker:w1")
        eventually(lambda: valkey.hget("rq:worker:w1", "birth"))
        eventually(lambda: "jobs: 1 finished, 1 failed" in command_line(valkey_url, "info", "--raw"), seconds=5)
        seconds = float(valkey.hget("rq:worker:w1", "total_working_time") or 0)

    assert 0.1 < seconds < 5


def test_the_shutdown_command_drains_and_kill_horse_is_ignored(valkey: redis.Redis, valkey_url: str) -> None:
    with working(valkey_url) as stop:
        eventually(lambda: valkey.hget("rq:worker:w1", "state") == b"idle")
        send_kill_horse_command(valkey, "w1")
        job = put(valkey, "a")
        await_status(job, "finished")
        assert not stop.requested
        send_shutdown_command(valkey, "w1")
        eventually(lambda: not valkey.exists("rq:worker:w1") or valkey.hexists("rq:worker:w1", "death"))

    assert stop.requested


def test_the_dashboard_shows_jobs_and_workers(
    valkey: redis.Redis, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rq_dashboard
    from flask import Flask

    app = Flask("dashboard")
    app.config.from_object(rq_dashboard.default_settings)
    app.config.update(RQ_DASHBOARD_REDIS_URL=valkey_url)
    monkeypatch.setattr(rq_dashboard.web.config, "serializer", JSONSerializer)  # what its -j does
    rq_dashboard.web.setup_rq_connection(app)
    app.register_blueprint(rq_dashboard.blueprint, url_prefix="/rq")
    with working(valkey_url, step_ms=10):
        done, failed, running = put(valkey, "a"), put(valkey, "!fail"), put(valkey, "b", max_tokens=2000)
        await_status(done, "finished")
        await_status(failed, "failed")
        await_status(running, "started")
        browser = app.test_client()
        answers = {path: browser.get(f"/rq/0/data/{path}") for path in PAGES} | {
            job.id: browser.get(f"/rq/0/data/job/{job.id}.json") for job in (done, failed, running)
        }

    assert {path: answer.status_code for path, answer in answers.items() if answer.status_code != 200} == {}
    assert "w1" in answers["workers.json"].text
    assert failed.id in answers["jobs/generate/failed/8/asc/1.json"].text


PAGES = [
    "queues.json",
    "workers.json",
    "jobs/generate-low/queued/8/asc/1.json",
    *(f"jobs/generate/{state}/8/asc/1.json" for state in ("queued", "started", "finished", "failed", "canceled")),
]


def test_what_is_not_one_of_our_labels_fails_with_a_clear_error_and_is_never_called(
    valkey: redis.Redis, valkey_url: str, tmp_path: Any
) -> None:
    queue = rq.Queue("generate", connection=valkey, serializer=JSONSerializer)
    pickled = rq.Queue("generate", connection=valkey)
    asked = {"input": {"prompt": "x"}}
    bad = {
        "label": queue.enqueue("os.mkdir", str(tmp_path / "called")),
        "kwargs": queue.enqueue("headrace.generate", input={"prompt": "x"}),
        "two arguments": queue.enqueue("headrace.generate", asked, asked),
        "field": queue.enqueue("headrace.generate", {"input": {"prompt": "x"}, "parms": {}}),
        "pickle": pickled.enqueue("headrace.generate", asked),
        "nothing": queue.enqueue("headrace.generate"),
    }
    with working(valkey_url):
        good = put(valkey, "x")
        ends = {name: await_status(job, "failed", "finished") for name, job in bad.items()}
        assert await_status(good, "finished") == "finished"
        errors = {name: json.loads(valkey.hget(f"rq:job:{job.id}", "error") or b"{}") for name, job in bad.items()}

    assert set(ends.values()) == {"failed"}
    assert not (tmp_path / "called").exists()
    assert all(error["code"] and error["message"] for error in errors.values()), errors
    assert "parms" in errors["field"]["message"]
    assert "os.mkdir" in errors["label"]["message"]


def test_rqs_job_timeout_fails_a_job_that_runs_too_long(valkey: Any, valkey_url: str) -> None:
    queue = rq.Queue("generate", connection=valkey, serializer=JSONSerializer)
    with working(valkey_url, step_ms=10):
        asked = {"input": {"prompt": "x"}, "params": {"max_tokens": 9000}}
        job = queue.enqueue("headrace.generate", asked, job_timeout=1)
        await_status(job, "failed")

    assert json.loads(valkey.hget(f"rq:job:{job.id}", "error"))["code"] == "job_timeout"


def test_commands_are_heard_again_after_redis_was_away(own_valkey: Server) -> None:
    client = redis.Redis.from_url(own_valkey.url)
    with working(own_valkey.url, step_ms=10):
        job = put(client, "a", max_tokens=100_000)
        await_status(job, "started")
        own_valkey.process.kill()
        own_valkey.process.wait()
        again = start_valkey(own_valkey.folder)
        try:
            eventually(lambda: client.pubsub_numsub("rq:pubsub:w1")[0][1])
            send_stop_job_command(client, job.id, serializer=JSONSerializer)
            assert await_status(job, "stopped", "failed") == "stopped"
        finally:
            client.close()
    again.process.kill()
    again.process.wait()
