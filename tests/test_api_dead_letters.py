"""Dead letters over HTTP and on the command line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import httpx2
import pytest

from headrace.answers import Job
from headrace.cli import main
from headrace.client import Client
from headrace.verbs.dead import _why
from jobs.store import Store
from tests.api_world import front, submit
from tests.jobs_world import born, settings
from tests.test_jobs_dead_letters import die

pytest_plugins = ("tests.api_world",)


@pytest.fixture
def store(valkey_url: str) -> Iterator[Store]:
    store = Store(settings(valkey_url))
    born(store)
    yield store
    store.close()


@pytest.fixture
def web(store: Store, valkey_url: str) -> Iterator[httpx2.Client]:
    """A client of an API with three dead letters and nothing else."""
    die(store, "d1", "d2", "d3")
    with front(valkey_url) as client:
        yield client


def ids(answer: httpx2.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["data"]]


def test_dead_letters_are_a_list_of_jobs_with_their_error(web: httpx2.Client) -> None:
    first = web.get("/v1/dead-letters?limit=2").json()
    second = web.get(f"/v1/dead-letters?after={first['last_id']}").json()

    assert (first["object"], first["first_id"], first["last_id"], first["has_more"]) == ("list", "d3", "d2", True)
    assert ([job["id"] for job in second["data"]], second["has_more"]) == (["d1"], False)
    assert first["data"][0] == web.get("/v1/jobs/d3").json()
    assert (first["data"][0]["reason"], first["data"][0]["error"]["code"]) == ("poison_job", "poison_job")
    assert web.get("/v1/dead-letters?after=nobody").status_code == 404
    assert "headrace_dead_letters 3.0" in web.get("/metrics").text


def test_those_named_or_all_are_queued_again(web: httpx2.Client) -> None:
    some = web.post("/v1/dead-letters/retry", json={"ids": ["d2", "nobody"]}).json()
    left = ids(web.get("/v1/dead-letters"))
    rest = web.post("/v1/dead-letters/retry").json()

    assert some == {"retried": 1, "ids": ["d2"], "skipped": ["nobody"], "has_more": False}
    assert left == ["d3", "d1"]
    assert rest == {"retried": 2, "ids": ["d3", "d1"], "skipped": [], "has_more": False}
    assert [web.get(f"/v1/jobs/{job_id}").json()["status"] for job_id in ("d1", "d2", "d3")] == ["queued"] * 3


@pytest.mark.parametrize(
    ("body", "param"),
    [({"ids": []}, "ids"), ({"ids": ["a b"]}, "ids.0"), ({"id": ["a"]}, "id"), ({"ids": ["a"] * 1001}, "ids")],
)
def test_a_retry_that_makes_no_sense_is_refused_by_name(web: httpx2.Client, body: object, param: str) -> None:
    answer = web.post("/v1/dead-letters/retry", json=body)

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    assert len(ids(web.get("/v1/dead-letters"))) == 3


def test_a_purge_forgets_them_all_and_one_alone_goes_as_a_job(web: httpx2.Client) -> None:
    other = submit(web)
    assert web.post("/v1/jobs/d1/retry").json()["status"] == "queued"
    assert web.delete("/v1/jobs/d2").status_code == 204
    purged = web.delete("/v1/dead-letters").json()

    assert purged == {"deleted": 1, "has_more": False}
    assert web.get("/v1/jobs/d3").status_code == 404
    assert web.get(f"/v1/jobs/{other['id']}").status_code == 200
    assert ids(web.get("/v1/dead-letters")) == []


def test_the_command_line_lists_explains_retries_and_purges(
    web: httpx2.Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: str) -> tuple[int, list[str]]:
        code = main(["dead", *words, "--url", str(web.base_url).rstrip("/")])
        return code, capsys.readouterr().out.splitlines()

    code, lines = run("--limit", "2")
    assert (code, [line.split()[0] for line in lines]) == (0, ["d3", "d2"])
    assert "UTC: the job was running each time its worker died" in lines[0]
    assert [json.loads(line)["id"] for line in run("list", "--json")[1]] == ["d3", "d2", "d1"]
    assert run("explain", "d1")[1][0].startswith("d1 failed, 3 attempts: the job was running")
    assert run("retry") == (2, [])
    assert run("retry", "d1", "--all") == (2, [])
    assert run("purge") == (2, [])  # nobody at a terminal, and no --yes
    assert run("list", "d1") == (2, [])
    monkeypatch.setattr("sys.stdin", io.StringIO("d1 d2"))
    assert run("retry", "-") == (0, ["d1", "d2"])
    assert run("retry", "d1", "--json") == (0, ['{"retried": 0, "ids": [], "skipped": ["d1"]}'])
    assert run("retry", "--all") == (0, ["d3"])
    assert run("purge", "--yes", "--json") == (0, ['{"deleted": 0}'])


def test_the_clients_know_them_too(web: httpx2.Client) -> None:
    with Client(str(web.base_url).rstrip("/")) as client:
        page = client.dead_letters(limit=2)
        retried = client.retry_dead_letters(["d1"])
        purged = client.purge_dead_letters()

    assert ([job.id for job in page.jobs], page.has_more) == (["d3", "d2"], True)
    assert (retried["ids"], purged["deleted"]) == (["d1"], 2)


def test_an_explanation_names_each_death() -> None:
    deaths = [
        {"attempt": 1, "worker": "w", "how": "signal SIGKILL", "at": 0.0, "tokens": 0, "neighbours": 3},
        {"attempt": 2, "worker": "v", "how": "exit code 1", "at": 60.0, "tokens": 7, "neighbours": 0},
        {"attempt": 3, "worker": "u"},
    ]
    error = {"code": "poison_job", "message": "no", "param": None}
    job = Job({"id": "a", "status": "failed", "attempt": 3, "error": error, "deaths": deaths})

    assert list(_why(job)) == [
        "a failed, 3 attempts: no",
        "  attempt 1 on w, 1970-01-01 00:00:00 UTC: signal SIGKILL at 0 tokens, beside 3 others",
        "  attempt 2 on v, 1970-01-01 00:01:00 UTC: exit code 1 at 7 tokens, alone",
        "  attempt 3 on u, at an unknown time: it died at 0 tokens",
    ]
