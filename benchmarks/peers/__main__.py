"""Headrace's engine and its peers on the same prompts, side by side, interleaved, in one run.

    python -m benchmarks.peers --systems engine openvino llama-q4 --repeats 3

``make bench-peers`` makes the peers' environments in .venv-peers and runs all. A system whose environment is not there
is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.peers.gguf_files import gguf_files
from benchmarks.peers.measure import measure
from benchmarks.peers.report import figures, page
from benchmarks.peers.seat import Ended, Seat
from benchmarks.peers.systems import INTERPRETERS, LLAMA_BINARIES, SYSTEMS, System
from benchmarks.rig import describe_machine
from benchmarks.workload import RUNNING, english, make_workload
from core.models.source import resolve

MODEL = "smollm2-135m"
WINDOW_TOKENS = 512


def main() -> None:
    """Load what was asked for, let them take turns, write the report."""
    arguments = _parser().parse_args()
    folder = resolve(MODEL)
    weights = {"folder": folder, **gguf_files(MODEL)}
    with tempfile.TemporaryDirectory(prefix="hr-peers-") as place, contextlib.ExitStack() as stack:
        asked = write_workload(folder, Path(place) / "workload.json")
        seats, skipped = _seat(arguments, weights, Path(place), stack)
        outcomes = measure(seats, len(asked["items"]), arguments.repeats, arguments.attempts)
    facts = {
        "machine": f"{arguments.threads} threads on {describe_machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.peers --systems {' '.join(arguments.systems)} --repeats {arguments.repeats}",
        "items": len(asked["items"]),
        "prompt_tokens": sum(len(item["token_ids"]) for item in asked["items"]),
        "answer_tokens": sum(item["answer_tokens"] for item in asked["items"]),
        "running": RUNNING,
    }
    print(page(outcomes, skipped, facts))
    if arguments.report:
        arguments.report.write_text(page(outcomes, skipped, facts), encoding="utf-8")
    if arguments.out:
        whole = {**facts, "systems": figures(outcomes), "skipped": skipped}
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def write_workload(folder: Path, path: Path) -> dict[str, Any]:
    """What every peer reads: the items, and the text for perplexity with its windows."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    text = (Path(__file__).parent / "prose.txt").read_text(encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    items = make_workload(tokenizer(english())["input_ids"])
    asked = {
        "items": [{"token_ids": item.token_ids, "answer_tokens": item.answer_tokens} for item in items],
        "text": text,
        "windows": [ids[at : at + WINDOW_TOKENS] for at in range(0, len(ids) - WINDOW_TOKENS + 1, WINDOW_TOKENS)],
    }
    path.write_text(json.dumps(asked), encoding="utf-8")
    return asked


def command(system: System, interpreter: Path, model: Path, workload: Path, arguments: argparse.Namespace) -> list[str]:
    """How a peer's process is started."""
    own = [part.format(llama=arguments.llama_binaries) for part in system.arguments]
    shared = ["--workload", str(workload), "--model", str(model)]
    shared += ["--threads", str(arguments.threads), "--running", str(RUNNING)]
    return [str(interpreter), "-P", "-m", f"benchmarks.peers.{system.module}", *shared, *own]


def _seat(
    arguments: argparse.Namespace, weights: Mapping[str, Path], place: Path, stack: contextlib.ExitStack
) -> tuple[dict[str, Seat], dict[str, str]]:
    """Load the systems one after the other; and those that cannot be, with the reason."""
    seats: dict[str, Seat] = {}
    skipped: dict[str, str] = {}
    interpreters = {**INTERPRETERS, **dict(arguments.python)}
    for name in arguments.systems:
        system = SYSTEMS[name]
        needed = [interpreters[system.environment]]
        needed += [arguments.llama_binaries / "llama-server"] if system.module == "llama_server" else []
        if missing := [path.name for path in needed if not path.exists()]:
            skipped[name] = f"{missing[0]} is not there; `make bench-peers` makes it"
            continue
        print(f"loading {system.label}", file=sys.stderr, flush=True)
        log = place / f"{name}.log"
        model = weights[system.weights]
        seat = Seat(command(system, needed[0], model, place / "workload.json", arguments), log)
        stack.callback(seat.close)
        try:
            seat.await_ready()
        except Ended:
            lines: Sequence[str] = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise SystemExit("\n".join([f"{system.label} did not load:", *lines[-20:]])) from None
        seats[name] = seat
    return seats, skipped


def _place(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if name not in INTERPRETERS or not path:
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, NAME one of {', '.join(INTERPRETERS)}")
    return name, Path(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=[*SYSTEMS], default=[*SYSTEMS], metavar="SYSTEM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attempts", type=int, default=3, help="at a turn that something else on the machine disturbs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--python", type=_place, action="append", default=[], metavar="NAME=PATH", help="interpreter")
    parser.add_argument("--llama-binaries", type=Path, default=LLAMA_BINARIES, metavar="DIR")
    parser.add_argument("--report", type=Path, help="write the page as Markdown")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser


if __name__ == "__main__":
    main()
