"""``headrace bench``: the loads it makes, the figures it takes of them, and runs against a real server and engine."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.bench.figures import Targets, percentile, spread, summary, table
from headrace.bench.load import BODIES, Lengths, Load, poisson_arrivals, synthetic_bodies
from headrace.bench.plot import svg
from headrace.bench.samples import Sample
from headrace.verbs.bench import BENCH
from tests.test_headrace_up import Up, headrace, started

SMALL = ("--requests", "12", "--prompt-tokens", "6", "--max-tokens", "4")


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with tempfile.TemporaryDirectory(prefix="hr-up-") as name:
        with started(Path(name), "--instant-step-ms", "5", "--max-running", "4") as one:
            yield one
            assert one.stop() == 0


def sample(
    *, due: float = 0.0, first: float = 0.5, gap: float = 0.1, tokens: int = 5, error: str | None = None
) -> Sample:
    deliveries = tuple((due + first + gap * number, 1) for number in range(tokens))
    ended = deliveries[-1][0] if deliveries else due + first
    return Sample(due=due, ended=ended, prompt_tokens=10, deliveries=deliveries, error=error)


@pytest.mark.parametrize("seed", range(20))
def test_percentiles_agree_with_the_standard_library(seed: int) -> None:
    source = random.Random(seed)
    values = [source.random() for _ in range(source.randrange(2, 300))]
    cuts = statistics.quantiles(values, n=100, method="inclusive")

    assert [percentile(values, percent) for percent in (1, 50, 90, 99)] == pytest.approx(
        [cuts[percent - 1] for percent in (1, 50, 90, 99)]
    )
    assert (percentile(values, 0), percentile(values, 100)) == (min(values), max(values))


def test_a_spread_of_one_value_is_that_value_and_of_none_is_nothing() -> None:
    assert spread([2.0, None]) == {"mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0, "max": 2.0}
    assert spread([None]) is None


@pytest.mark.parametrize(
    ("targets", "good"),
    [
        (Targets(), 3),
        (Targets(ttft=0.6), 2),
        (Targets(itl=0.15), 2),
        (Targets(e2e=1.0), 1),
        (Targets(ttft=0.6, itl=0.15, e2e=1.0), 1),
        (Targets(ttft=0.1), 0),
    ],
)
def test_goodput_counts_requests_that_succeeded_and_kept_every_target(targets: Targets, good: int) -> None:
    samples = [sample(), sample(first=0.9), sample(gap=0.2), sample(first=0.01, tokens=0, error="queue_full")]
    figures = summary(samples, targets)

    assert figures["goodput"]["requests"] == good
    assert figures["goodput"]["share"] == good / 4
    assert figures["goodput"]["requests_per_second"] == pytest.approx(good / figures["seconds"])


def test_a_summary_tells_what_failed_and_leaves_it_out_of_the_latencies() -> None:
    figures = summary([sample(), sample(due=1.0), sample(first=9.0, tokens=0, error="queue_full")], Targets())

    assert (figures["requests"], figures["succeeded"], figures["errors"]) == (3, 2, {"queue_full": 1})
    assert (figures["seconds"], figures["output_tokens"], figures["prompt_tokens"]) == (9.0, 10, 20)
    assert figures["output_tokens_per_second"] == pytest.approx(10 / 9)
    assert figures["ttft_seconds"]["max"] == pytest.approx(0.5)
    assert figures["itl_seconds"]["p50"] == pytest.approx(0.1)
    assert figures["e2e_seconds"]["mean"] == pytest.approx(0.9)
    assert "1 failed: queue_full" in table(figures)


def test_tokens_that_come_together_are_one_delivery_and_share_its_time() -> None:
    one = Sample(due=1.0, ended=3.0, deliveries=((2.0, 1), (2.4, 3), (3.0, 1)))

    assert one.gaps == pytest.approx([0.4, 0.6])
    assert one.token_seconds == pytest.approx(1.0 / 4)
    assert (one.ttft, one.e2e, one.tokens) == (1.0, 2.0, 5)


def test_nothing_at_all_is_a_summary_too() -> None:
    figures = summary([], Targets(ttft=1.0))

    assert (figures["requests_per_second"], figures["ttft_seconds"], figures["goodput"]["share"]) == (0.0, None, 0.0)
    assert "goodput" in table(figures)
    ElementTree.fromstring(svg([], "nothing"))


def test_poisson_arrivals_have_the_rate_and_the_variance_and_depend_on_the_seed_only() -> None:
    due = poisson_arrivals(50.0, 20_000, math.inf, seed=7)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]

    assert due == poisson_arrivals(50.0, 20_000, math.inf, seed=7)
    assert due != poisson_arrivals(50.0, 20_000, math.inf, seed=8)
    assert due == sorted(due)
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 50, rel=0.05)


def test_no_arrival_is_later_than_the_duration() -> None:
    due = poisson_arrivals(100.0, 1_000_000, 3.0, seed=1)

    assert 200 < len(due) < 400
    assert max(due) < 3.0


def test_made_up_jobs_have_the_lengths_that_were_asked_for_and_known_tokens_only() -> None:
    prompt, answer = Lengths.parse("100,0.7,16,512"), Lengths.parse("9")
    bodies = synthetic_bodies(5_000, prompt, answer, vocab_size=300, seed=3)
    lengths = [len(body["input"]["prompt_token_ids"]) for body in bodies]

    assert len(bodies) == BODIES
    assert min(lengths) >= 16
    assert max(lengths) <= 512
    assert statistics.median(lengths) == pytest.approx(100, rel=0.1)
    assert all(0 <= token < 300 for body in bodies for token in body["input"]["prompt_token_ids"])
    assert all(body["params"] == {"max_tokens": 9, "ignore_eos": True} for body in bodies)
    assert bodies == synthetic_bodies(5_000, prompt, answer, vocab_size=300, seed=3)
    assert Load(bodies=bodies, requests=2_000).body(BODIES + 1) == bodies[1]


@pytest.mark.parametrize("text", ["", "0", "x", "5,0.7", "100,0.7,200,300", "100,9,1,200", "100,0.7,0,200", "10000000"])
def test_lengths_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Lengths.parse(text)


@pytest.mark.parametrize(
    "words",
    [
        ("--concurrency", "0"),
        ("--concurrency", "801"),
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--rate", "1", "--concurrency", "1"),
        ("--requests", "1.5"),
        ("--duration", "-1"),
        ("--seed", "-1"),
        ("--ttft-target", "inf"),
        ("--prompt-tokens", "0"),
    ],
)
def test_every_option_has_bounds(words: tuple[str, ...]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=True)
    BENCH.add(parser)

    with pytest.raises(SystemExit):
        parser.parse_args(words)


def test_the_picture_is_well_formed_and_escapes_its_title() -> None:
    drawn = svg([sample(due=number / 10) for number in range(50)], "a <b> & c")

    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert "a &lt;b&gt; &amp; c" in drawn


def test_a_closed_loop_over_http_never_has_more_at_once_than_callers(up: Up, tmp_path: Path) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    done = headrace("bench", *SMALL, "--concurrency", "3", "--url", up.url, "--out", str(out), "--plot", str(plot))
    report = json.loads(out.read_text())
    ends = [(one["due"], 1) for one in report["samples"]] + [(one["due"] + one["e2e"], -1) for one in report["samples"]]
    at_once, most = 0, 0
    for _, change in sorted(ends):
        at_once += change
        most = max(most, at_once)

    assert (done.returncode, done.stderr) == (0, "")
    assert "12 of 12 requests" in done.stdout
    assert (report["loop"], report["succeeded"], report["output_tokens"], report["prompt_tokens"]) == (
        "closed",
        12,
        48,
        72,
    )
    assert most == 3
    assert all(0 < one["ttft"] <= one["e2e"] for one in report["samples"])
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_an_open_loop_over_http_sends_when_it_is_due_whatever_is_unanswered(up: Up) -> None:
    words = ("--rate", "400", "--seed", "5", "--ttft-target", "30", "--e2e-target", "0.000001")
    done = headrace("bench", *SMALL, *words, "--url", up.url, "--json")
    report = json.loads(done.stdout)
    loose = json.loads(
        headrace("bench", *SMALL, "--rate", "400", "--itl-target", "30", "--url", up.url, "--json").stdout
    )

    assert done.returncode == 0
    assert (report["loop"], report["rate"], report["succeeded"]) == ("open", 400.0, 12)
    assert report["goodput"]["requests"] == 0
    assert loose["goodput"]["share"] == 1.0


def test_jobs_come_from_a_file_and_what_the_server_refuses_is_counted(up: Up, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a b c", "max_tokens": 3}\n{"prompt": "d", "max_tokens": -1}\n')
    words = ("--requests", "6", "--concurrency", "1", "--file", str(jobs), "--url", up.url, "--json")
    report = json.loads(headrace("bench", *words).stdout)

    assert (report["requests"], report["succeeded"], report["output_tokens"]) == (6, 3, 9)
    assert sum(report["errors"].values()) == 3


def test_a_duration_ends_the_sending_and_what_runs_is_waited_for(up: Up) -> None:
    words = ("--duration", "0.5", "--concurrency", "2", "--max-tokens", "4", "--prompt-tokens", "4")
    report = json.loads(headrace("bench", *words, "--url", up.url, "--json").stdout)

    assert report["requests"] == report["succeeded"] > 2
    assert 0.4 < report["seconds"] < 10


@pytest.mark.parametrize("loop", [("--concurrency", "3"), ("--rate", "200")])
def test_a_bare_engine_is_measured_without_a_server(loop: tuple[str, ...]) -> None:
    done = headrace("bench", *SMALL, *loop, "--in-process", "--engine", "instant", "--instant-step-ms", "2", "--json")
    report = json.loads(done.stdout)

    assert (done.returncode, report["server"], report["engine"]) == (0, "in process", "instant")
    assert (report["succeeded"], report["output_tokens"], report["prompt_tokens"]) == (12, 48, 72)
    assert report["itl_seconds"]["p50"] >= 0.002


def test_what_cannot_be_is_said_before_anything_is_measured(up: Up, tmp_path: Path) -> None:
    nowhere = headrace("bench", *SMALL, "--url", up.url, "--out", str(tmp_path / "no" / "bench.json"))
    picture = headrace("bench", *SMALL, "--url", up.url, "--plot", "bench.png")
    vllm = headrace("bench", *SMALL, "--in-process", "--engine", "vllm")
    away = headrace("bench", *SMALL, "--url", "http://127.0.0.1:9")

    assert [one.returncode for one in (nowhere, picture, vllm, away)] == [2, 2, 2, 3]
    assert "no such folder" in nowhere.stderr
    assert "must end in .svg" in picture.stderr
