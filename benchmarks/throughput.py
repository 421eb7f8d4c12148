"""Tokens per second of one workload, side by side, interleaved, in one run.

    python -m benchmarks.throughput --repeats 3

Prints a table (medians, spread, ratios) and, with --out, writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
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
    with tempfile.TemporaryDirectory(prefix="hr-bench-") as name:
        whole = WholeSystem(folder, arguments.dtype, Path(name))
        try:
            systems: dict[str, System] = {
                "engine": BareEngine(folder, arguments.dtype, arguments.threads),
                "system": whole,
                "static": PlainTransformers(folder, arguments.dtype, rows=32),
                "single": PlainTransformers(folder, arguments.dtype, rows=1, limit=8),
            }
            runs = measure(systems, items, arguments.repeats)
            counters = whole.counters()
        finally:
            whole.close()
    report = make_report(runs, counters, arguments)
    print(table(report))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(systems: dict[str, System], items: Sequence[Item], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each run, by system; A B C D A B C D …, so that drift hits all alike."""
    for system in systems.values():
        system.run(items[:4])
    runs: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            runs[name].append(system.run(items).tokens_per_second)
            print(f"{NAMES[name]}: {runs[name][-1]:.1f} tokens/s", flush=True)
    return runs


def make_report(
    runs: dict[str, list[float]], counters: dict[str, float], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Medians, spreads, and the ratios that the README quotes, each the median of the ratios within one round."""
    ratio = {
        "system/engine": _ratio(runs["system"], runs["engine"]),
        "engine/static": _ratio(runs["engine"], runs["static"]),
        "engine/single": _ratio(runs["engine"], runs["single"]),
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(),
        "command": f"python -m benchmarks.throughput --dtype {arguments.dtype} --repeats {arguments.repeats}",
        "model": arguments.model,
        "tokens_per_second": {
            name: {"median": statistics.median(values), "runs": values} for name, values in runs.items()
        },
        "ratios": ratio,
        "loop_seconds_outside_step_over_step": counters["loop_seconds"] / counters["step_seconds"],
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    static = report["tokens_per_second"]["static"]["median"]
    lines = ["| system | tokens/s, median | spread | ratio to static batches |", "|---|---|---|---|"]
    for name, figures in report["tokens_per_second"].items():
        spread = f"{min(figures['runs']):.0f} … {max(figures['runs']):.0f}"
        lines.append(f"| {NAMES[name]} | {figures['median']:.1f} | {spread} | {figures['median'] / static:.2f} |")
    lines.append("")
    lines += [f"{name}: {value:.2f} (median of the rounds)" for name, value in report["ratios"].items()]
    lines.append(f"loop outside step() over step(): {report['loop_seconds_outside_step_over_step']:.3f}")
    lines.append(f"{report['machine']}, {report['date']}, `{report['command']}`")
    return "\n".join(lines)


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _machine() -> str:
    return f"{torch.get_num_threads()} threads on {describe_machine()}, torch {torch.__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub name")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser


if __name__ == "__main__":
    main()
