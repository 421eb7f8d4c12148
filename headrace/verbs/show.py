"""``demo`` and ``version``."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import platform
from dataclasses import replace
from pathlib import Path

from headrace.demo import Demo, print_answers
from headrace.private import private_server
from headrace.verbs.serve import ENGINE_SETTINGS
from headrace.verbs.verb import FAILED, OK, Invocation, Verb

NAME = "headrace"


def demo(invocation: Invocation) -> int:
    """Start everything, ask a few dozen things at once, show how they are batched, write it all down."""
    # The page of a job is read often and the figures at the end: both as fresh as can be had.
    settings = replace(invocation.settings, tick_seconds=min(invocation.settings.tick_seconds, 0.5))
    invocation.note(f"starting Valkey, API and a worker with {settings.model} ({settings.dtype}) …")
    with private_server(settings, invocation.environ) as server:
        report = asyncio.run(Demo(server.url, server.api_key, shown=not invocation.json).run(settings.workers))
    path = Path(invocation.arguments.output)
    path.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if not invocation.json:
        print_answers(report["jobs"])
    summary = {name: value for name, value in report.items() if name != "jobs"}
    invocation.print(
        {**summary, "jobs": len(report["jobs"]), "file": str(path)},
        f"\n{len(report['jobs'])} jobs, {report['completion_tokens']} tokens in {report['seconds']:.1f} s: "
        f"{report['tokens_per_second']:.1f} tokens/s, mean decode batch {report['mean_decode_batch']:.1f} "
        f"({report['model']}, {report['dtype']})\nall of it is in {path}",
    )
    return OK if all(job["status"] == "succeeded" for job in report["jobs"]) else FAILED


def version(invocation: Invocation) -> int:
    """Of Headrace, and of what runs it."""
    number = importlib.metadata.version(NAME)
    facts = {"headrace": number, "python": platform.python_version(), "platform": platform.platform()}
    invocation.print(facts, f"headrace {number} (Python {facts['python']}, {facts['platform']})")
    return OK


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="demo.json", metavar="FILE", help="where the report goes (demo.json)")


DEMO = Verb(
    name="demo",
    text="start everything, answer a few dozen jobs in batches, stop everything",
    example="headrace demo --dtype float32",
    settings=("workers", *ENGINE_SETTINGS, "tick_seconds", "instant_step_ms"),
    run=demo,
    add=_add_demo,
)
VERSION = Verb(
    name="version",
    text="print the version",
    example="headrace version --json",
    settings=(),
    run=version,
)
