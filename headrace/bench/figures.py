"""Samples → figures: throughput, percentiles, goodput. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace.bench.samples import Sample

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a request has to keep to count as good; None: anything will do."""

    ttft: float | None = None  #: seconds to the first token
    itl: float | None = None  #: seconds a token after it, on average over the request
    e2e: float | None = None  #: seconds to the end

    def met_by(self, sample: Sample) -> bool:
        """It succeeded, and within every target."""
        kept = ((self.ttft, sample.ttft), (self.itl, sample.token_seconds), (self.e2e, sample.e2e))
        return sample.error is None and all(limit is None or value is None or value <= limit for limit, value in kept)


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values in proportion, as numpy has it by default.

    Args:
        values: at least one, in any order.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples: Sequence[Sample], targets: Targets) -> dict[str, Any]:
    """Everything that is told about a run; ``None`` where there is nothing to take a percentile of."""
    good = [sample for sample in samples if targets.met_by(sample)]
    done = [sample for sample in samples if sample.error is None]
    seconds = max((sample.ended for sample in samples), default=0.0)
    return {
        "requests": len(samples),
        "succeeded": len(done),
        "errors": dict(Counter(sample.error for sample in samples if sample.error is not None)),
        "seconds": seconds,
        "requests_per_second": _rate(len(done), seconds),
        "prompt_tokens": sum(sample.prompt_tokens for sample in done),
        "prompt_tokens_per_second": _rate(sum(sample.prompt_tokens for sample in done), seconds),
        "output_tokens": sum(sample.tokens for sample in done),
        "output_tokens_per_second": _rate(sum(sample.tokens for sample in done), seconds),
        "ttft_seconds": spread(sample.ttft for sample in done),
        "itl_seconds": spread(gap for sample in done for gap in sample.gaps),
        "token_seconds": spread(sample.token_seconds for sample in done),
        "e2e_seconds": spread(sample.e2e for sample in done),
        "targets": asdict(targets),
        "goodput": {
            "requests": len(good),
            "share": len(good) / len(samples) if samples else 0.0,
            "requests_per_second": _rate(len(good), seconds),
            "output_tokens_per_second": _rate(sum(sample.tokens for sample in good), seconds),
        },
    }


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, percentiles and maximum of those that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    named = {f"p{percent}": percentile(known, percent) for percent in PERCENTILES}
    return {"mean": math.fsum(known) / len(known), **named, "max": max(known)}


def table(figures: dict[str, Any]) -> str:
    """The summary for a person."""
    good = figures["goodput"]
    lines = [
        f"{figures['succeeded']} of {figures['requests']} requests in {figures['seconds']:.1f} s: "
        f"{figures['requests_per_second']:.2f} requests/s, {figures['output_tokens_per_second']:.1f} output tokens/s, "
        f"{figures['prompt_tokens_per_second']:.1f} prompt tokens/s",
        *(f"  {count} failed: {code}" for code, count in figures["errors"].items()),
        "",
        f"{'milliseconds':<28}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    names = {
        "ttft_seconds": "time to first token",
        "itl_seconds": "between deliveries",
        "token_seconds": "a token, by request",
        "e2e_seconds": "end to end",
    }
    for name, words in names.items():
        values = figures[name]
        cells = "".join(f"{1000 * value:>10.1f}" for value in values.values()) if values else f"{'-':>10}" * 5
        lines.append(f"{words:<28}{cells}")
    wanted = {name: limit for name, limit in figures["targets"].items() if limit is not None}
    if wanted:
        words = ", ".join(f"{name} <= {limit:g} s" for name, limit in wanted.items())
        lines += ["", f"goodput ({words}): {good['requests_per_second']:.2f} requests/s, {good['share']:.1%} of all"]
    return "\n".join(lines)


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
