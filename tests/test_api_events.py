"""Event streams: complete, resumable, alive, and gone when nobody listens."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import cast

import anyio
import httpx2
import pytest
import redis
import rq.job
import rq.serializers

from api.app import create_app
from api.settings import ApiSettings
from core.request import Kind
from jobs.async_store import AsyncStore
from jobs.job import Job, JobState
from jobs.reports import LoggedEvent
from tests.api_world import events_of, finish, front, read_events, submit

pytest_plugins = ("tests.api_world",)


@pytest.fixture
def lonely_with_heartbeats(valkey_url: str) -> Iterator[httpx2.Client]:
    """A client of an API without a worker, with two places for streams and a quick heart."""
    with front(valkey_url, heartbeat_seconds=0.05, max_streams=2) as client:
        yield client


def test_events_are_numbered_from_0_without_a_hole_and_end_with_the_whole_job(api: httpx2.Client) -> None:
    events = events_of(api, submit(api)["id"])
    last = events[-1]

    assert [event.number for event in events] == list(range(len(events)))
    assert [events[0].type, last.type] == ["started", "finished"]
    assert {event.type for event in events[1:-1]} == {"token"}
    assert last.fields["job"]["status"] == "succeeded"
    assert last.fields["job"]["result"]["choices"][0]["token_ids"]


def test_the_texts_of_the_tokens_joined_are_exactly_the_results_text(api: httpx2.Client) -> None:
    *tokens, finished = events_of(api, submit(api, params={"max_tokens": 30, "stop": ["7 "]})["id"])[1:]
    [choice] = finished.fields["job"]["result"]["choices"]

    assert "".join(token.fields["text"] for token in tokens) == choice["text"]
    assert [i for token in tokens for i in token.fields["token_ids"]] == choice["token_ids"]


def test_a_stream_goes_on_after_any_event_as_if_never_broken(api: httpx2.Client) -> None:
    job_id = finish(api)["id"]
    whole = events_of(api, job_id)
    for number in range(-1, len(whole) - 1):
        assert (
            events_of(api, job_id, headers={"last-event-id": str(number)} if number >= 0 else {}) == whole[number + 1 :]
        )
        assert events_of(api, job_id, params={"after": number}) == whole[number + 1 :]
        assert events_of(api, job_id, params={"last_event_id": number}) == whole[number + 1 :]


def test_the_header_of_a_reconnecting_browser_wins_over_its_query(api: httpx2.Client) -> None:
    job_id = finish(api)["id"]
    last = events_of(api, job_id)[-1].number
    headers = {"last-event-id": str(last - 1)}

    assert last > 1
    assert events_of(api, job_id, params={"after": 0}, headers=headers)[0].number == last
    assert events_of(api, job_id, headers={"last-event-id": "nonsense"})[0].number == 0


def test_a_client_that_has_seen_the_end_is_told_to_stop_asking(api: httpx2.Client) -> None:
    job_id = finish(api)["id"]
    last = events_of(api, job_id)[-1].number
    answer = api.get(f"/v1/jobs/{job_id}/events", headers={"last-event-id": str(last)})

    assert answer.status_code == 204


def test_no_event_has_an_error_on_top_that_clients_would_raise(api: httpx2.Client) -> None:
    events = events_of(api, submit(api, input={"prompt": "!fail"})["id"])

    assert events[-1].fields["job"]["error"]["code"] == "engine_error"
    assert not any("error" in event.fields for event in events)


def test_tokens_arrive_while_the_job_runs(api: httpx2.Client) -> None:
    job = submit(api, params={"max_tokens": 200})
    with api.stream("GET", job["urls"]["events"]) as stream:
        events = read_events(stream.iter_lines())
        seen = [next(events) for _ in range(3)]
        status = api.get(job["urls"]["self"]).json()["status"]
        rest = list(events)

    assert [event.type for event in seen] == ["started", "token", "token"]
    assert status == "running"
    assert rest[-1].type == "finished"


def test_two_readers_of_one_job_see_the_same(api: httpx2.Client) -> None:
    job_id, seen = submit(api, params={"max_tokens": 50})["id"], []
    threads = [threading.Thread(target=lambda: seen.append(events_of(api, job_id))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(seen) == 4
    assert all(events == seen[0] for events in seen)


def test_a_stream_opened_before_the_job_is_claimed_ends_with_its_cancellation(lonely: httpx2.Client) -> None:
    job = submit(lonely)
    with lonely.stream("GET", job["urls"]["events"]) as stream:
        cancelled = lonely.post(job["urls"]["cancel"])
        events = list(read_events(stream.iter_lines()))

    assert cancelled.status_code == 200
    assert [event.type for event in events] == ["finished"]
    assert events[0].number == 0
    assert events[0].fields["job"]["status"] == "cancelled"


def test_a_job_that_rqs_own_tools_end_ends_its_stream_too(valkey: redis.Redis, valkey_url: str) -> None:
    with front(valkey_url) as client:
        job = submit(client)
        with client.stream("GET", job["urls"]["events"]) as stream:
            rq.job.Job.fetch(job["id"], connection=valkey, serializer=rq.serializers.JSONSerializer).cancel()
            events = list(read_events(stream.iter_lines()))
        again = client.get(job["urls"]["events"], headers={"last-event-id": "0"})

    assert [(event.number, event.type) for event in events] == [(0, "finished")]
    assert events[0].fields["job"]["status"] == "cancelled"
    assert again.status_code == 204


class CutLog:
    """A store that has a job's end but not the event of it."""

    async def get(self, job_id: str) -> Job:
        return Job(id=job_id, kind=Kind.GENERATE, state=JobState.CANCELLED, created_at=0.0)

    async def events(self, job_id: str, after: int) -> list[LoggedEvent]:
        log = [LoggedEvent(number=0, type="started", fields={}), LoggedEvent(number=1, type="token", fields={})]
        return log[after + 1 :]

    async def watch(self, job_id: str, after: int) -> AsyncGenerator[list[LoggedEvent], None]:
        if log := await self.events(job_id, after):
            yield log


@pytest.mark.parametrize(("after", "numbers"), [(-1, [0, 1, 2]), (0, [1, 2]), (1, [2]), (2, [])])
def test_a_stream_ends_with_the_job_even_where_the_log_does_not(after: int, numbers: list[int]) -> None:
    async def get() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=create_app(ApiSettings(), cast("AsyncStore", CutLog())))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(f"/v1/jobs/a/events?after={after}")

    answer = anyio.run(get)
    events = list(read_events(answer.iter_lines()))

    assert [event.number for event in events] == numbers
    assert [event.type for event in events[-1:]] == ["finished"] * bool(numbers)
    assert answer.status_code == (200 if numbers else 204)


def test_heartbeats_are_comments(lonely_with_heartbeats: httpx2.Client) -> None:
    job = submit(lonely_with_heartbeats)
    with lonely_with_heartbeats.stream("GET", job["urls"]["events"]) as stream:
        lines = stream.iter_lines()
        seen = [next(lines) for _ in range(8)]

    assert set(seen) == {f": job {job['id']}", ": still here", ""}


def test_streams_are_bounded_and_a_closed_one_makes_room(lonely_with_heartbeats: httpx2.Client) -> None:
    client, job = lonely_with_heartbeats, submit(lonely_with_heartbeats)
    url = job["urls"]["events"]
    with client.stream("GET", url) as first, client.stream("GET", url) as second:
        assert (first.status_code, second.status_code) == (200, 200)
        third = client.get(url)
        poll = client.get(f"{job['urls']['self']}?wait=5")
    deadline = time.monotonic() + 10
    while True:
        with client.stream("GET", url) as again:
            status = again.status_code
        if status == 200 or time.monotonic() > deadline:
            break

    assert third.status_code == 503
    assert third.json()["error"]["code"] == "too_many_streams"
    assert 1 <= int(third.headers["retry-after"]) <= 120
    assert poll.status_code == 200  # a poll is answered at once instead of held
    assert status == 200
