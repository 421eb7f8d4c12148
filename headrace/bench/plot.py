"""Samples → one SVG picture: the latencies' distributions, and output tokens a second over time. No library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from headrace.bench.samples import Sample

WIDTH, HEIGHT, MARGIN = 480, 300, 50
GAP = 40  #: between the two panels
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44")
FONT = 'font-family="sans-serif" font-size="11"'


def svg(samples: Sequence[Sample], title: str) -> str:
    """The whole picture; samples that failed are left out."""
    done = [sample for sample in samples if sample.error is None]
    curves = {
        "first token": [sample.ttft for sample in done if sample.ttft is not None],
        "between deliveries": [gap for sample in done for gap in sample.gaps],
        "end to end": [sample.e2e for sample in done],
    }
    whole = 2 * (WIDTH + MARGIN) + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{HEIGHT + 2 * MARGIN}">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{MARGIN}" y="22" {FONT} font-weight="bold">{escape(title)}</text>',
            f'<g transform="translate({MARGIN},{MARGIN})">',
            *_distributions({name: sorted(values) for name, values in curves.items() if values}),
            "</g>",
            f'<g transform="translate({2 * MARGIN + WIDTH + GAP // 2},{MARGIN})">',
            *_rates(done),
            "</g>",
            "</svg>",
            "",
        ]
    )


def _distributions(curves: dict[str, list[float]]) -> Iterable[str]:
    """Share of values below, over milliseconds on a logarithmic axis."""
    values = [1000 * value for ordered in curves.values() for value in ordered]
    low = math.floor(math.log10(max(min(values, default=1.0), 1e-2)))
    high = max(low + 1, math.ceil(math.log10(max(max(values, default=1.0), 1e-2))))

    def across(milliseconds: float) -> float:
        place = (math.log10(max(milliseconds, 1e-2)) - low) / (high - low)
        return WIDTH * min(1.0, max(0.0, place))

    yield from _frame("milliseconds", "share of values below")
    for power in range(low, high + 1):
        yield from _tick_below(across(10.0**power), f"{10.0**power:g}")
    for share in (0, 0.5, 0.9, 1):
        yield from _tick_beside(_up(share), f"{share:g}")
    for number, (name, ordered) in enumerate(curves.items()):
        points = [(across(1000 * value), _up((place + 1) / len(ordered))) for place, value in _thinned(ordered)]
        yield _line([(points[0][0], float(HEIGHT)), *points], COLOURS[number])
        yield f'<text x="8" y="{16 + 14 * number}" {FONT} fill="{COLOURS[number]}">{name}</text>'


def _rates(done: Sequence[Sample]) -> Iterable[str]:
    """Bars: tokens that arrived in each slice of the time."""
    yield from _frame("seconds", "output tokens a second")
    end = max((sample.ended for sample in done), default=1.0)
    slices = min(60, max(1, round(end / 0.5)))
    length = end / slices
    counts = [0] * slices
    for sample in done:
        for moment, tokens in sample.deliveries:
            counts[min(slices - 1, int(moment / length))] += tokens
    top = max(1.0, max(counts) / length)
    for number, count in enumerate(counts):
        height = HEIGHT * count / length / top
        place = f'x="{WIDTH * number / slices:.1f}" y="{HEIGHT - height:.1f}"'
        yield f'<rect {place} width="{WIDTH / slices * 0.9:.1f}" height="{height:.1f}" fill="{COLOURS[0]}"/>'
    for share in (0, 0.5, 1):
        yield from _tick_below(WIDTH * share, f"{end * share:.3g}")
        yield from _tick_beside(_up(share), f"{top * share:.0f}")


def _frame(below: str, beside: str) -> Iterable[str]:
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>'
    yield f'<text x="{WIDTH / 2}" y="{HEIGHT + 36}" text-anchor="middle" {FONT}>{below}</text>'
    yield f'<text x="0" y="-8" {FONT}>{beside}</text>'


def _tick_below(x: float, text: str) -> Iterable[str]:
    yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}" stroke="#ddd"/>'
    yield f'<text x="{x:.1f}" y="{HEIGHT + 16}" text-anchor="middle" {FONT}>{text}</text>'


def _tick_beside(y: float, text: str) -> Iterable[str]:
    yield f'<line x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
    yield f'<text x="-6" y="{y + 4:.1f}" text-anchor="end" {FONT}>{text}</text>'


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _thinned(ordered: Sequence[float], most: int = 400) -> list[tuple[int, float]]:
    """Places and values, few enough to draw; the last one always."""
    step = max(1, len(ordered) // most)
    places = [*range(0, len(ordered) - 1, step), len(ordered) - 1]
    return [(place, ordered[place]) for place in places]


def _up(share: float) -> float:
    return HEIGHT * (1 - share)
