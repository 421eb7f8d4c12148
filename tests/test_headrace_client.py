"""The client against a server that answers as the test says: refusals, broken connections, streams that are cut."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from headrace.answers import Event, Job
from headrace.calls import body_of
from headrace.client import AsyncClient, Client
from headrace.errors import (
    Conflict,
    InvalidRequest,
    JobFailed,
    NotFound,
    Overloaded,
    TimedOut,
    Unauthorized,
    Unreachable,
)
from headrace.patience import Patience, Tries
from tests.processes import free_port

HASTY = Patience(busy_seconds=2.0, broken_pause_seconds=0.01)


class Server:
    """Answers each request with the next line of its script, and remembers what it was asked."""

    def __init__(self) -> None:
        self.script: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        outer = self

        class Answering(BaseHTTPRequestHandler):
            def do_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.asked.append((self.command, self.path, headers, json.loads(body) if body else None))
                outer.script.pop(0)(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_any  # noqa: N815 - the names that http.server calls

            def log_message(self, *words: object) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, api_key="sk_1", patience=HASTY) as one:
        yield one


def answers(status: int, body: Any = None, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(request: BaseHTTPRequestHandler) -> None:
        text = b"" if body is None else json.dumps(body).encode()
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("content-length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    return send


def hangs_up(request: BaseHTTPRequestHandler) -> None:
    """Take the request and close the connection."""
    request.close_connection = True


def streams(text: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """Server-sent events, then the connection closes."""

    def send(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("content-type", "text/event-stream")
        request.end_headers()
        request.wfile.write(text.encode())

    return send


def event(number: int, kind: str, **fields: Any) -> str:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(fields)}\n\n"


def job(status: str, **more: Any) -> dict[str, Any]:
    return {"id": "job_1", "status": status, **more}


def problem(status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """An error as our API writes it: RFC 9457 and OpenAI's shape in one body."""
    inner = {"message": "no", "type": "invalid_request_error", "param": param, "code": code}
    return {"type": "about:blank", "title": "t", "status": status, "detail": "no", "error": inner}


def test_a_refusal_for_now_is_repeated_after_the_time_the_server_asks_for_with_the_same_id(
    server: Server, client: Client
) -> None:
    busy = problem(429, "queue_full")
    server.script = [answers(429, busy, retry_after="0.1"), answers(503, busy, retry_after="0.1"), hangs_up]
    server.script += [answers(202, job("queued"))]

    assert client.submit("hello", max_tokens=3).status == "queued"
    assert len({path for _, path, _, _ in server.asked}) == 1
    assert server.asked[0][0] == "PUT"
    assert all(asked[3] == server.asked[0][3] for asked in server.asked)
    assert server.asked[0][3] == {"kind": "generate", "input": {"prompt": "hello"}, "params": {"max_tokens": 3}}
    assert server.asked[0][2]["authorization"] == "Bearer sk_1"


def test_patience_with_a_busy_server_ends(server: Server, client: Client) -> None:
    server.script = [answers(429, problem(429, "queue_full"), retry_after="60")]

    with pytest.raises(Overloaded, match="queue_full"):
        client.submit("hello")
    assert len(server.asked) == 1  # sixty seconds are more than we had: no point in waiting


def test_a_refusal_that_is_not_to_be_repeated_is_not(server: Server, client: Client) -> None:
    server.script = [
        answers(429, problem(429, "deadline_unreachable"), retry_after="0.1", x_should_retry="false"),
        answers(202, job("queued")),
    ]

    with pytest.raises(Overloaded, match="deadline_unreachable"):
        client.submit({"input": {"prompt": "hello"}, "deadline_seconds": 1, "refuse_if_late": True})
    assert server.asked[0][3]["refuse_if_late"] is True
    assert len(server.asked) == 1


def test_pauses_are_at_least_what_the_server_asks_for_and_never_exceed_the_patience() -> None:
    tries = Tries(Patience(busy_seconds=10))
    pauses = [tries.pause_after_status(429, "3") for _ in range(4)]

    assert [pause is not None and 3 <= pause <= 3.3 for pause in pauses] == [True, True, True, False]
    assert tries.pause_after_status(400, "3") is None


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, InvalidRequest), (401, Unauthorized), (404, NotFound), (409, Conflict), (422, InvalidRequest)],
)
def test_an_error_is_an_exception_with_status_code_param_and_request_id(
    server: Server, client: Client, status: int, error: type[InvalidRequest]
) -> None:
    server.script = [answers(status, problem(status, "some_code", "input.prompt"), x_request_id="req_7")]

    with pytest.raises(error) as raised:
        client.get("job_1")
    found = raised.value
    assert (found.status, found.code, found.param, found.request_id) == (status, "some_code", "input.prompt", "req_7")


def test_an_error_without_json_is_still_an_exception(server: Server, client: Client) -> None:
    server.script = [lambda request: request.send_error(404, "<html>")]

    with pytest.raises(NotFound):
        client.get("job_1")


def test_nobody_there_is_unreachable() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url, patience=HASTY) as client, pytest.raises(Unreachable, match=url):
        client.get("job_1")


STREAM = (
    event(0, "started", attempt=1),
    event(1, "token", index=0, text="Hel", token_ids=[1]),
    ": still here\n\n",
    event(2, "token", index=0, text="lo", token_ids=[2, 3]),
    event(3, "finished", job=job("succeeded")),
)


def check_resumed(server: Server, read: list[Event]) -> None:
    assert [one.number for one in read] == [0, 1, 2, 3]
    assert "".join(one.text for one in read) == "Hello"
    assert read[-1].job is not None
    assert read[-1].job.succeeded
    assert [asked[2].get("last-event-id") for asked in server.asked] == [None, "1", "1", "1"]


def cut_stream() -> list[Callable[[BaseHTTPRequestHandler], None]]:
    """Two events and half of the third; nothing; a refusal; the rest."""
    half = STREAM[3][:-10]
    busy = answers(503, problem(503, "store_unavailable"), retry_after="0.05")
    return [streams("".join(STREAM[:3]) + half), hangs_up, busy, streams("".join(STREAM[3:]))]


def test_a_stream_that_is_cut_goes_on_after_the_last_whole_event(server: Server, client: Client) -> None:
    server.script = cut_stream()
    check_resumed(server, list(client.events("job_1")))


def test_the_async_client_resumes_alike(server: Server) -> None:
    server.script = cut_stream()

    async def read() -> list[Event]:
        async with AsyncClient(server.url, patience=HASTY) as client:
            return [one async for one in client.events("job_1")]

    check_resumed(server, asyncio.run(read()))


def test_a_stream_of_which_nothing_is_left_ends(server: Server, client: Client) -> None:
    server.script = [streams(STREAM[0]), answers(204)]

    assert [one.number for one in client.events("job_1")] == [0]


def test_a_stream_that_a_server_in_trouble_ended_empty_is_asked_for_again(server: Server, client: Client) -> None:
    server.script = [streams(": job job_1\n\n: store_unavailable\n\n"), streams("".join(STREAM))]

    assert [one.number for one in client.events("job_1")] == [0, 1, 2, 3]


def test_the_streamed_text_of_a_failed_job_ends_with_an_exception(server: Server, client: Client) -> None:
    failed = job("failed", error={"code": "engine_error", "message": "broken", "param": None})
    server.script = [streams(STREAM[1] + event(2, "finished", job=failed))]
    pieces = client.stream("job_1")

    assert next(pieces) == "Hel"
    with pytest.raises(JobFailed, match="job_1 failed: broken"):
        next(pieces)


def test_waiting_asks_again_until_the_job_has_ended(server: Server, client: Client) -> None:
    server.script = [answers(200, job("queued")), answers(200, job("running")), answers(200, job("succeeded"))]

    assert client.wait("job_1", timeout=60).succeeded
    assert all("wait=30" in path for _, path, _, _ in server.asked)


def test_waiting_ends_with_the_time_given(server: Server, client: Client) -> None:
    server.script = [answers(200, job("running"))] * 100

    with pytest.raises(TimedOut, match=r"job_1 has not ended within 0\.01 s"):
        client.wait("job_1", timeout=0.01)


def test_a_result_is_read_whatever_its_kind() -> None:
    choice = {"index": 0, "text": "Hi", "finish_reason": "stop", "token_ids": [5, 6], "logprobs": None}
    text = Job(job("succeeded", result={"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}))
    ids = Job(job("succeeded", result={"token_ids": [7], "usage": {"prompt_tokens": 1}}))

    assert (text.text, text.token_ids, text.finish_reason, text.usage["completion_tokens"]) == ("Hi", [5, 6], "stop", 2)
    assert (ids.text, ids.token_ids, ids.finish_reason) == ("", [7], None)
    assert (Job(job("queued")).text, Job(job("queued")).ended) == ("", False)


def test_each_choice_of_a_job_has_its_text_and_its_own_stream(server: Server, client: Client) -> None:
    choices = [{"index": i, "text": text, "finish_reason": "stop", "token_ids": [i]} for i, text in enumerate("ab")]
    last = job("succeeded", result={"choices": choices, "usage": {}})
    pieces = [
        event(i, "token", index=i % 2, text=text, token_ids=[i]) for i, text in enumerate(["a1", "b1", "a2", "b2"])
    ]
    server.script = [streams("".join([*pieces, event(4, "finished", job=last)]))] * 3

    assert list(client.stream("job_1")) == ["a1", "a2"]
    assert list(client.stream("job_1", 1)) == ["b1", "b2"]
    assert [one.index for one in client.events("job_1")] == [0, 1, 0, 1, 0]
    assert (Job(last).texts, Job(last).text, Job(job("queued")).texts) == (["a", "b"], "a", [])


def test_what_is_asked_may_be_text_a_chat_or_a_whole_body() -> None:
    turn = {"role": "user", "content": "Hi"}

    assert body_of("Hi") == {"kind": "generate", "input": {"prompt": "Hi"}}
    assert body_of([turn], seed=None, top_k=0)["params"] == {"top_k": 0}
    assert body_of([turn])["input"] == {"messages": [turn]}
    whole = {"kind": "predict", "input": {"token_ids": [1]}, "metadata": {"a": "b"}}
    assert body_of(whole) == whole
    assert body_of("Hi", priority=-5) == {"kind": "generate", "input": {"prompt": "Hi"}, "priority": -5}
    assert body_of({**whole, "priority": 3}, priority=0)["priority"] == 0
    assert body_of({**whole, "priority": 3})["priority"] == 3
    assert body_of({"input": {"prompt": "x"}, "params": {"seed": 1, "top_k": 2}}, seed=3)["params"] == {
        "seed": 3,
        "top_k": 2,
    }
