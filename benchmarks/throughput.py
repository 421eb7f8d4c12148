"""Tokens per second of one workload, side by side, interleaved, in one run.

    python -m benchmarks.throughput --repeats 3
    python -m benchmarks.throughput --systems engine system --repeats 5

Prints a table (medians, spread, ratios), and what the queue and HTTP cost beside the engine, counted in seconds; with
--out it writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer

from benchmarks.rig import describe_machine
from benchmarks.systems import BareEngine, PlainTransformers, Run, WholeSystem
from benchmarks.workload import Item, english, make_workload
from core.models.source import resolve


class System(Protocol):
    """Anything that can run the workload."""

    def run(self, items: Sequence[Item]) -> Run: ...


NAMES = {
    "engine": "Headrace, bare engine",
    "system": "Headrace, whole system over HTTP",
    "static": "Transformers, static batches of 32",
    "single": "Transformers, one at a time (first 8)",
}


def main() -> None:
    """Run the systems in turn, ``--repeats`` times, after one warm-up each."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    folder = resolve(arguments.model)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    items = make_workload(tokenizer(english())["input_ids"])
    makers: dict[str, Callable[[], System]] = {
        "engine": lambda: BareEngine(folder, arguments.dtype, arguments.threads),
        "static": lambda: PlainTransformers(folder, arguments.dtype, rows=32),
        "single": lambda: PlainTransformers(folder, arguments.dtype, rows=1, limit=8),
    }
    with tempfile.TemporaryDirectory(prefix="hr-bench-") as name:
        whole = WholeSystem(folder, arguments.dtype, Path(name)) if "system" in arguments.systems else None
        try:
            systems = {name: makers[name]() if name in makers else whole for name in arguments.systems}
            runs, counters = measure(systems, items, arguments.repeats, whole)
        finally:
            if whole is not None:
                whole.close()
    report = make_report(runs, counters, arguments)
    print(table(report))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(
    systems: Mapping[str, System | None], items: Sequence[Item], repeats: int, whole: WholeSystem | None
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens per second of each run, by system, and what the whole system counted meanwhile.

    They take turns, A B C D A B C D …, after a warm-up each, so that drift hits all alike.
    """
    turns = {name: system for name, system in systems.items() if system is not None}
    for system in turns.values():
        system.run(items[:4])
    before = whole.counters() if whole else {}
    runs: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats):
        for name, system in turns.items():
            runs[name].append(system.run(items).tokens_per_second)
            print(f"{NAMES[name]}: {runs[name][-1]:.1f} tokens/s", flush=True)
    after = whole.counters() if whole else {}
    return runs, {name: value - before[name] for name, value in after.items()}


def make_report(
    runs: dict[str, list[float]], counters: dict[str, float], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Medians, spreads, and the ratios that the README quotes, each the median of the ratios within one round."""
    pairs = (("system", "engine"), ("engine", "static"), ("engine", "single"))
    ratio = {f"{one}/{other}": _ratios(runs[one], runs[other]) for one, other in pairs if {one, other} <= runs.keys()}
    command = f"--systems {' '.join(runs)} --dtype {arguments.dtype} --repeats {arguments.repeats}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(),
        "command": f"python -m benchmarks.throughput {command}",
        "model": arguments.model,
        "tokens_per_second": {
            name: {"median": statistics.median(values), "runs": values} for name, values in runs.items()
        },
        "ratios": ratio,
        "over_step_seconds": {
            name: counters[name] / counters["step_seconds"]
            for name in ("loop_seconds", "served_seconds", "started_seconds")
        }
        if counters
        else {},
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    first = next(iter(report["tokens_per_second"].values()))["median"]
    lines = ["| system | tokens/s, median | spread | ratio to the first |", "|---|---|---|---|"]
    for name, figures in report["tokens_per_second"].items():
        spread = f"{min(figures['runs']):.0f} … {max(figures['runs']):.0f}"
        lines.append(f"| {NAMES[name]} | {figures['median']:.1f} | {spread} | {figures['median'] / first:.2f} |")
    lines.append("")
    lines += [
        f"{name}: {statistics.median(values):.3f}, median of the rounds ({min(values):.3f} … {max(values):.3f})"
        for name, values in report["ratios"].items()
    ]
    if counted := report["over_step_seconds"]:
        lines.append(
            f"seconds over those of step(): the loop outside it {counted['loop_seconds']:.2%}, processors' in API and "
            f"Valkey {counted['served_seconds']:.2%}; in what starts these {counted['started_seconds']:.2%}"
        )
    lines.append(f"{report['machine']}, {report['date']}, `{report['command']}`")
    return "\n".join(lines)


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _machine() -> str:
    return f"{torch.get_num_threads()} threads on {describe_machine()}, torch {torch.__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub name")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--systems", nargs="+", default=list(NAMES), choices=NAMES, help="which take turns")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser


if __name__ == "__main__":
    main()
