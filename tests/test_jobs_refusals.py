"""Submissions that are refused: before memory is full, and when a deadline cannot be met. What is there goes on."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import httpx2
import pytest
import redis

from core.errors import DeadlineUnreachable, JobNotFound, StoreFull
from core.request import Request
from jobs.async_store import AsyncStore
from jobs.job import JobState, NewJob
from jobs.memory import FULL_SHARE, Lately, MemoryReport, read_memory
from jobs.store import Store
from tests.api_world import GENERATE, front
from tests.conftest import Server
from tests.jobs_world import add, audit, born, done, say, settings, take, text_of
from tests.processes import until

S = JobState
MIB = 2**20


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url))
    born(store)
    yield store
    store.close()


# -- memory


def fill(store: Store) -> list[str]:
    """Ended jobs of three megabytes together."""
    ids = [f"filler-{number}" for number in range(30)]
    for job_id in ids:
        store.submit(NewJob(id=job_id, request=Request(prompt=secrets.token_hex(100_000))))
        store.cancel(job_id)
    return ids


def set_limit(client: redis.Redis, share: float) -> int:
    """Give the server so much memory that what it uses now is ``share`` of it."""
    limit = int(read_memory(client.info("memory")).used_bytes / share)
    client.config_set("maxmemory", limit)
    return limit


def test_before_memory_is_full_submissions_are_refused_and_what_runs_ends(own_valkey: Server) -> None:
    store = Store(settings(own_valkey.url))
    born(store)
    fillers = fill(store)
    add(store, "runs")
    [job] = take(store)
    client = store.connection
    with front(own_valkey.url) as web:
        assert web.put("/v1/jobs/known", json=GENERATE).status_code == 202
        limit = set_limit(client, FULL_SHARE + 0.03)
        refused = until(lambda: refusal(web.post("/v1/jobs", json=GENERATE)))
        repeated = web.put("/v1/jobs/known", json=GENERATE)
        store.report([say(job, *range(500))], [done(job)])
        ended = web.get("/v1/jobs/runs").json()
        metrics = web.get("/metrics").text
        for job_id in fillers:
            assert web.delete(f"/v1/jobs/{job_id}").status_code == 204
        until(lambda: web.put("/v1/jobs/late", json=GENERATE).status_code == 202)

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert f"of its {limit / MIB:.1f} MiB" in refused.json()["detail"]
    assert repeated.status_code == 200  # a known id needs no memory
    assert ended["status"] == "succeeded"
    assert len(text_of(store.events("runs"))) > 1500
    gauges = dict(line.split(" ", 1) for line in metrics.splitlines() if line.startswith("headrace_store_memory"))
    assert float(gauges["headrace_store_memory_limit_bytes"]) == limit
    assert float(gauges["headrace_store_memory_bytes"]) > limit * FULL_SHARE
    assert audit(client) == []
    store.close()


def refusal(answer: httpx2.Response) -> httpx2.Response | None:
    """None for a job that was still taken, by the report of a second ago."""
    return answer if answer.status_code == 503 else None


def test_the_blocking_door_refuses_alike(own_valkey: Server) -> None:
    store = Store(settings(own_valkey.url))
    add(store, "known")
    set_limit(store.connection, FULL_SHARE + 0.05)
    later = Store(settings(own_valkey.url))
    with pytest.raises(StoreFull, match=r"uses .* MiB of its .* MiB"):
        add(later, "late")

    assert add(later, "known").state is S.QUEUED
    with pytest.raises(JobNotFound):
        later.get("late")
    set_limit(store.connection, FULL_SHARE - 0.2)
    assert add(Store(settings(own_valkey.url)), "late").state is S.QUEUED


@pytest.mark.parametrize(("used", "limit", "full"), [(81, 100, True), (80, 100, False), (10**9, 0, False)])
def test_full_is_above_80_percent_of_a_limit_that_is_set(used: int, limit: int, full: bool) -> None:
    assert MemoryReport(used_bytes=used, limit_bytes=limit).full is full


def test_what_does_not_count_against_the_limit_is_left_out() -> None:
    info = {"used_memory": 90, "mem_not_counted_for_evict": 20, "maxmemory": 100}

    assert read_memory(info) == MemoryReport(used_bytes=70, limit_bytes=100)


def test_memory_is_looked_at_once_a_second_however_many_submit(valkey_url: str, valkey: redis.Redis) -> None:
    async def submit() -> None:
        door = AsyncStore(settings(valkey_url))
        new = [door.submit(NewJob(id=f"a{number}", request=Request(prompt="x"))) for number in range(100)]
        await asyncio.gather(*new)
        await door.close()

    valkey.config_resetstat()
    asyncio.run(submit())
    now, looks = [0.0], list[float]()

    def look() -> MemoryReport:
        looks.append(now[0])
        return MemoryReport(used_bytes=0, limit_bytes=0)

    lately = Lately(look, lambda: now[0])
    for now[0] in (0.0, 0.9, 1.0, 1.9, 2.0):
        lately.get()

    assert valkey.info("commandstats")["cmdstat_info"]["calls"] == 1
    assert looks == [0.0, 1.0, 2.0]


# -- deadlines


def with_speed(store: Store, ended: int, queued: int) -> None:
    """So many jobs ended just now, and so many wait: ended / 10 a second."""
    for _ in range(ended):
        add(store)
    for job in take(store):
        store.report([], [done(job)])
    for _ in range(queued):
        add(store)


def hasty(store: Store, job_id: str, seconds: float) -> JobState:
    """Submit a job that is refused if it is late."""
    return add(store, job_id, deadline_seconds=seconds, refuse_if_late=True).state


def test_a_job_that_cannot_meet_its_deadline_is_refused_and_leaves_nothing(store: Store, valkey: redis.Redis) -> None:
    with_speed(store, ended=10, queued=30)  # about one a second, so half a minute
    before = store.queue()
    with pytest.raises(DeadlineUnreachable) as refused:
        hasty(store, "late", 5)

    assert 10 <= refused.value.estimate_seconds <= 60
    assert refused.value.retry_after_seconds == refused.value.estimate_seconds - 5
    assert "deadline_seconds: 5, and the job's turn would come in about" in str(refused.value)
    assert store.queue() == before
    with pytest.raises(JobNotFound):
        store.get("late")
    assert audit(valkey) == []


def test_a_job_that_can_meet_its_deadline_or_did_not_ask_is_taken(store: Store) -> None:
    with_speed(store, ended=10, queued=30)

    assert hasty(store, "patient", 300) is S.QUEUED
    assert add(store, "silent", deadline_seconds=5).state is S.QUEUED


def test_a_repeat_is_answered_however_long_the_queue_has_become(store: Store) -> None:
    assert hasty(store, "a", 5) is S.QUEUED
    with_speed(store, ended=10, queued=30)

    assert add(store, "a", deadline_seconds=5, refuse_if_late=True).id == "a"


def test_without_an_estimate_nobody_is_refused(store: Store) -> None:
    assert hasty(store, "idle", 1) is S.QUEUED  # nothing has ended, nobody waits
    assert hasty(store, "busy", 1) is S.QUEUED  # nothing has ended, somebody waits: nobody knows


def test_over_http_a_late_job_is_429_with_the_estimate_and_nobody_repeats_it_unasked(
    store: Store, valkey_url: str
) -> None:
    with_speed(store, ended=10, queued=30)
    body = {**GENERATE, "refuse_if_late": True}
    with front(valkey_url) as web:
        late = web.post("/v1/jobs", json={**body, "deadline_seconds": 2})
        taken = web.post("/v1/jobs", json={**body, "deadline_seconds": 600})
        senseless = web.post("/v1/jobs", json=body)

    assert (late.status_code, late.json()["error"]["code"]) == (429, "deadline_unreachable")
    assert late.json()["error"]["param"] == "deadline_seconds"
    assert 1 <= int(late.headers["retry-after"]) <= 120
    assert late.headers["x-should-retry"] == "false"  # the deadline of a repeat is another one
    assert taken.status_code == 202
    assert (senseless.status_code, senseless.json()["error"]["param"]) == (422, "refuse_if_late")
    assert "needs deadline_seconds" in senseless.json()["detail"]
