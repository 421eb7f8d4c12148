"""How a peer's process talks to the run: lines of JSON out, words in. Standard library only; knows no engine.

A peer loads its model, says what it is, and then waits, so that the systems can take turns with all of them loaded:

    {"versions": {…}, "settings": {…}}                   once it is ready
    run N        →  {"seconds": …, "answers": [[…]]}     the first N items of the workload, once
    perplexity   →  {"perplexity": …} or {"cannot": "why"}
    quit
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Item:
    """One request: a prompt, and how many tokens to answer it with."""

    token_ids: list[int]
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Prose:
    """What perplexity is taken of: a text, and its first tokens cut into windows of equal length."""

    text: str
    windows: list[list[int]]


class CannotScore(Exception):
    """This engine gives no log-probabilities of given tokens; the text says why."""


class Peer(Protocol):
    """An engine with its model loaded."""

    versions: Mapping[str, str]
    settings: Mapping[str, Any]  #: as a reader would type them, with the precision of ``weights`` and ``cache``

    def run(self, items: Sequence[Item]) -> list[list[int]]:
        """Greedy answers of exactly the asked lengths, in the order of the items."""

    def perplexity(self, prose: Prose) -> float:
        """Of the second half of each window, as ``perplexity_of`` has it.

        Raises:
            CannotScore: it does not tell log-probabilities of given tokens.
        """


def perplexity_of(logprobs: Sequence[Sequence[float]]) -> float:
    """Perplexity as llama.cpp's tool takes it: only tokens that have half a window before them count.

    Args:
        logprobs: for each window those of its tokens, the first left out.
    """
    counted = [value for window in logprobs for value in window[(len(window) + 1) // 2 :]]
    return math.exp(-math.fsum(counted) / len(counted))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every peer takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--workload", type=Path, required=True, help="JSON: items, text, windows")
    made.add_argument("--model", type=Path, required=True, help="folder or GGUF file")
    made.add_argument("--threads", type=int, required=True)
    made.add_argument("--running", type=int, required=True, help="at most so many at once")
    return made


def serve(load: Callable[[], Peer], workload: Path) -> None:
    """Load, then do what standard input says until it ends; what libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    asked = json.loads(workload.read_text(encoding="utf-8"))
    items = [Item(item["token_ids"], item["answer_tokens"]) for item in asked["items"]]
    peer = load()
    print(json.dumps({"versions": dict(peer.versions), "settings": dict(peer.settings)}), file=out)
    for line in sys.stdin:
        match line.split():
            case ["run", count]:
                answer = _timed(peer, items[: int(count)])
            case ["perplexity"]:
                answer = _perplexity(peer, Prose(asked["text"], asked["windows"]))
            case ["quit"]:
                break
            case other:
                raise SystemExit(f"no such words: {other}")
        print(json.dumps(answer), file=out)


def _timed(peer: Peer, items: Sequence[Item]) -> dict[str, Any]:
    start = time.perf_counter()
    answers = peer.run(items)
    seconds = time.perf_counter() - start
    for item, answer in zip(items, answers, strict=True):
        if len(answer) != item.answer_tokens:
            raise SystemExit(f"asked for {item.answer_tokens} tokens and got {len(answer)}")
    return {"seconds": seconds, "answers": answers}


def _perplexity(peer: Peer, prose: Prose) -> dict[str, Any]:
    try:
        return {"perplexity": peer.perplexity(prose)}
    except CannotScore as reason:
        return {"cannot": str(reason)}
