"""``bench``: puts load on a server, or on a bare engine, and tells throughput, latencies and goodput."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from headrace.bench import load as loads
from headrace.bench.figures import Targets, summary, table
from headrace.bench.in_process import ENGINE_FLAGS, bare_engine
from headrace.bench.load import Lengths, Load
from headrace.bench.over_http import drive
from headrace.bench.plot import svg
from headrace.bench.samples import Sample
from headrace.calls import body_of
from headrace.settings import SettingError
from headrace.verbs.ask import line_body
from headrace.verbs.verb import CLIENT_SETTINGS, FAILED, OK, Invocation, Verb

DEFAULT_REQUESTS, DEFAULT_CONCURRENCY = 100, 8
MOST_CALLERS = 800
PROMPT_LENGTHS, ANSWER_LENGTHS = "100,0.7,16,512", "74,0.8,8,256"
SMALLEST_VOCABULARY = 1_000  #: of a server that does not say how many tokens its model knows


def bench(invocation: Invocation) -> int:
    """Run the load and report; 1 when nothing succeeded."""
    arguments = invocation.arguments
    _check_outputs(arguments)
    targets = Targets(ttft=arguments.ttft_target, itl=arguments.itl_target, e2e=arguments.e2e_target)
    facts, samples = _run_in_process(invocation) if arguments.in_process else _run_over_http(invocation)
    report = {**facts, **_mode(arguments), "date": time.strftime("%Y-%m-%d"), **summary(samples, targets)}
    if arguments.out:
        whole = {**report, "samples": [sample.to_wire() for sample in samples]}
        Path(arguments.out).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        Path(arguments.plot).write_text(svg(samples, _title(report)), encoding="utf-8")
    invocation.print(report, f"{_title(report)}\n{table(report)}")
    return OK if report["succeeded"] else FAILED


def _run_over_http(invocation: Invocation) -> tuple[dict[str, Any], list[Sample]]:
    settings = invocation.settings
    with invocation.client() as client:
        cards = client.models()
    if not cards:
        raise SettingError(f"no worker serves a model at {settings.url}")
    load = _load(invocation.arguments, cards[0])
    with _progress(invocation, load) as advance:
        samples = asyncio.run(drive(settings.url, settings.read_api_key(), load, advance))
    return _facts(settings.url, cards[0], "id"), samples


def _run_in_process(invocation: Invocation) -> tuple[dict[str, Any], list[Sample]]:
    invocation.note("loading the engine …")
    with bare_engine(invocation.settings, invocation.environ) as engine:
        load = _load(invocation.arguments, engine.card)
        with _progress(invocation, load) as advance:
            samples = engine.drive(load, advance)
    return _facts("in process", engine.card, "name"), sorted(samples, key=lambda sample: sample.due)


def _load(arguments: argparse.Namespace, card: Mapping[str, Any]) -> Load:
    """The load that the flags describe."""
    seconds = math.inf if arguments.duration is None else arguments.duration
    default = DEFAULT_REQUESTS if arguments.duration is None else loads.MOST_REQUESTS
    requests = default if arguments.requests is None else arguments.requests
    bodies = _bodies(arguments, requests, int(card.get("vocab_size") or SMALLEST_VOCABULARY))
    if arguments.rate is None:
        return Load(
            bodies=bodies,
            requests=requests,
            concurrency=DEFAULT_CONCURRENCY if arguments.concurrency is None else arguments.concurrency,
            seconds=seconds,
        )
    due = loads.poisson_arrivals(arguments.rate, requests, seconds, arguments.seed)
    return Load(bodies=bodies, requests=len(due), due=due, seconds=seconds)


def _bodies(arguments: argparse.Namespace, requests: int, vocab_size: int) -> Sequence[Mapping[str, Any]]:
    if not arguments.file:
        return loads.synthetic_bodies(
            requests, arguments.prompt_tokens, arguments.max_tokens, vocab_size=vocab_size, seed=arguments.seed
        )
    try:
        text = sys.stdin.read() if arguments.file == "-" else Path(arguments.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{arguments.file} cannot be read: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise SettingError(f"{arguments.file} holds no job")
    return [body_of(line_body(number, line)) for number, line in lines]


@contextmanager
def _progress(invocation: Invocation, load: Load) -> Iterator[Callable[[], None]]:
    """A bar on standard error where that is a terminal."""
    shown = sys.stderr.isatty() and not invocation.json
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        total = load.requests if load.requests < loads.MOST_REQUESTS else None
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)


def _facts(server: str, card: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"server": server, "model": card.get(name), "dtype": card.get("dtype"), "engine": card.get("engine")}


def _mode(arguments: argparse.Namespace) -> dict[str, Any]:
    concurrency = DEFAULT_CONCURRENCY if arguments.concurrency is None else arguments.concurrency
    loop = {"concurrency": concurrency} if arguments.rate is None else {"rate": arguments.rate}
    return {"loop": "closed" if arguments.rate is None else "open", **loop, "seed": arguments.seed}


def _title(report: Mapping[str, Any]) -> str:
    loop = f"{report['concurrency']} callers" if report["loop"] == "closed" else f"{report['rate']:g} requests/s"
    return f"{report['model']} ({report['dtype']}) {report['server']}, {report['loop']} loop, {loop}, {report['date']}"


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raise SettingError before the run for what could not be written after it."""
    for name in ("out", "plot"):
        path = getattr(arguments, name)
        if path and not Path(path).absolute().parent.is_dir():
            raise SettingError(f"--{name} {path}: there is no such folder")
    if arguments.plot and not arguments.plot.endswith(".svg"):
        raise SettingError(f"--plot {arguments.plot}: must end in .svg, the one format it writes")


def _number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """A parser of numbers within a bound."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            words = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {words} from {low:g} to {high:g}, not {text!r}")
        return value

    return parse


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _add(parser: argparse.ArgumentParser) -> None:
    loop = parser.add_mutually_exclusive_group()
    text = f"closed loop: so many callers, each waits for its answer and asks again ({DEFAULT_CONCURRENCY})"
    loop.add_argument("--concurrency", type=_number(int, 1, MOST_CALLERS), metavar="N", help=text)
    text = "open loop: so many requests a second on average, arriving at random (Poisson), whatever is unanswered"
    loop.add_argument("--rate", type=_number(float, 0.001, 100_000), metavar="R", help=text)
    text = f"send at most so many ({DEFAULT_REQUESTS}, without end where --duration is given)"
    parser.add_argument("--requests", type=_number(int, 1, loads.MOST_REQUESTS), metavar="N", help=text)
    text = "send for so long, then wait for what runs"
    parser.add_argument("--duration", type=_number(float, 0.1, 86_400), metavar="SECONDS", help=text)
    text = f"length of prompts: N, or MEDIAN,SIGMA,LOW,HIGH of a clipped lognormal ({PROMPT_LENGTHS})"
    parser.add_argument("--prompt-tokens", type=_lengths, default=PROMPT_LENGTHS, metavar="N|M,S,L,H", help=text)
    text = f"length of answers, which do not end earlier ({ANSWER_LENGTHS})"
    parser.add_argument("--max-tokens", type=_lengths, default=ANSWER_LENGTHS, metavar="N|M,S,L,H", help=text)
    parser.add_argument("--file", metavar="FILE", help="jobs as JSON objects, a line each, instead of made-up ones")
    parser.add_argument("--seed", type=_number(int, 0, 2**63), default=0, metavar="N", help="of lengths and arrivals")
    for name, words in (("ttft", "to the first token"), ("itl", "a token after it"), ("e2e", "to the end")):
        text = f"goodput: only requests that take at most so long {words}"
        parser.add_argument(f"--{name}-target", type=_number(float, 0, 86_400), metavar="SECONDS", help=text)
    parser.add_argument("--out", metavar="FILE", help="write the figures and every request as JSON")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw latencies and throughput")
    parser.add_argument("--in-process", action="store_true", help="measure a bare engine: no server, queue or HTTP")


BENCH = Verb(
    name="bench",
    text="put load on a server or a bare engine: throughput, latencies, goodput",
    example="headrace bench --rate 4 --requests 200 --ttft-target 0.5 --out bench.json --plot bench.svg",
    settings=(*CLIENT_SETTINGS, *ENGINE_FLAGS),
    run=bench,
    add=_add,
)
