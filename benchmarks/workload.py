"""The one workload that every system is given: prompts as token ids, lengths drawn once from a fixed seed.

Lengths: prompts lognormal (median 100, sigma 0.7, clipped to 16 … 512), answers lognormal (median 74, sigma 0.8,
clipped to 8 … 256), greedy, end of sequence ignored. The text is this repository's LICENSE, cut at random.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

SEED = 20261123
RUNNING = 32  #: at most this many at once, in every system


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One request: a prompt and exactly so many answer tokens."""

    token_ids: tuple[int, ...]
    answer_tokens: int


def english() -> str:
    """Some eleven kilobytes of English."""
    return (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")


def make_workload(text_ids: list[int], count: int = 64) -> list[Item]:
    """Cut ``count`` prompts out of the tokenised text.

    Raises:
        ValueError: the text is shorter than the longest prompt.
    """
    if len(text_ids) <= 512:
        raise ValueError(f"the text has {len(text_ids)} tokens and the longest prompt 512")
    draw = random.Random(SEED)
    items = []
    for _ in range(count):
        prompt = _lognormal(draw, median=100, sigma=0.7, low=16, high=512)
        answer = _lognormal(draw, median=74, sigma=0.8, low=8, high=256)
        start = draw.randrange(len(text_ids) - prompt)
        items.append(Item(token_ids=tuple(text_ids[start : start + prompt]), answer_tokens=answer))
    return items


def _lognormal(draw: random.Random, *, median: int, sigma: float, low: int, high: int) -> int:
    return min(high, max(low, round(draw.lognormvariate(math.log(median), sigma))))
