"""How a peer's process talks to the run: lines of JSON out, words in. Standard library only; knows no engine.

A peer loads its model, says what it is, and then waits, so that the systems can take turns with all of them loaded:

    {"versions": {…}, "settings": {…}}           once it is ready
    run       →  {"seconds": …, "answers": [[…]]}    the workload once
    warm      →  the same with the first few items
    score     →  {"logprobs": [[…]]}                 of each given token after its window's first, or {"cannot": "why"}
    quit
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

WARM_ITEMS = 8


@dataclass(frozen=True, slots=True)
class Item:
    """One request: a prompt, and how many tokens to answer it with."""

    token_ids: list[int]
    answer_tokens: int


class CannotScore(Exception):
    """This engine gives no log-probabilities of given tokens; the text says why."""


class Peer(Protocol):
    """An engine with its model loaded."""

    versions: Mapping[str, str]
    settings: Mapping[str, Any]  #: as a reader would type them, with the precision of ``weights`` and ``cache``

    def run(self, items: Sequence[Item]) -> list[list[int]]:
        """Greedy answers of exactly the asked lengths, in the order of the items."""

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each token of each window but its first.

        Raises:
            CannotScore: it does not give them.
        """


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every peer takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--workload", type=Path, required=True, help="JSON: running, items, windows")
    made.add_argument("--model", type=Path, required=True, help="folder or GGUF file")
    made.add_argument("--threads", type=int, required=True)
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
        match line.strip():
            case "run":
                answer = _timed(peer, items)
            case "warm":
                answer = _timed(peer, items[:WARM_ITEMS])
            case "score":
                answer = _scored(peer, asked["windows"])
            case "quit":
                break
            case other:
                raise SystemExit(f"no such word: {other}")
        print(json.dumps(answer), file=out)


def _timed(peer: Peer, items: Sequence[Item]) -> dict[str, Any]:
    start = time.perf_counter()
    answers = peer.run(items)
    seconds = time.perf_counter() - start
    for item, answer in zip(items, answers, strict=True):
        if len(answer) != item.answer_tokens:
            raise SystemExit(f"asked for {item.answer_tokens} tokens and got {len(answer)}")
    return {"seconds": seconds, "answers": answers}


def _scored(peer: Peer, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    try:
        return {"logprobs": peer.score(windows)}
    except CannotScore as reason:
        return {"cannot": str(reason)}
