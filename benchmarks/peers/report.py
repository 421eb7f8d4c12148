"""The outcomes as a page: medians, spreads, ratios within rounds, precisions, settings, versions, machine, date."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.measure import Outcome
from benchmarks.peers.systems import SYSTEMS

OURS = "engine"


def page(outcomes: Mapping[str, Outcome], skipped: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """Markdown.

    Args:
        skipped: systems that did not run, and why.
        facts: ``machine``, ``date``, ``command``, ``prompt_tokens``, ``answer_tokens``, ``items``, ``running``.
    """
    return "\n".join(
        [
            "# Peers",
            "",
            f"{facts['items']} requests at once as token ids, {facts['prompt_tokens']:,} prompt and "
            f"{facts['answer_tokens']:,} answer tokens, greedy, end of sequence ignored, at most {facts['running']} "
            "running; SmolLM2-135M-Instruct, all from the same Q4_1 file (dequantised once where the weights say so). "
            "All loaded in processes of their own, taking turns; answer tokens over wall time of the whole set.",
            "",
            *_table(outcomes),
            "",
            "The ratio is the median of the rounds' ratios. Agreement: how many of the answers are ours, token for "
            "token; greedy bfloat16 answers differ by rounding.",
            "",
            *_perplexities(outcomes),
            "",
            "## Settings",
            "",
            *(f"* {SYSTEMS[name].label}: {_settings(outcome)}" for name, outcome in outcomes.items()),
            *(f"* {SYSTEMS[name].label}: **not run**: {why}" for name, why in skipped.items()),
            "",
            *_quietness(outcomes),
            "",
            f"{facts['machine']}, {facts['date']}, `{facts['command']}`",
            "",
        ]
    )


def figures(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The same for programs."""
    return {
        name: {
            "tokens_per_second": [turn.tokens_per_second for turn in outcome.turns],
            "median": outcome.median,
            "perplexity": outcome.perplexity,
            "foreign_cores": [turn.foreign_cores for turn in outcome.turns],
            **outcome.facts,
        }
        for name, outcome in outcomes.items()
    }


def _table(outcomes: Mapping[str, Outcome]) -> list[str]:
    ours = outcomes.get(OURS)
    lines = [
        "| system | weights | cache | tokens/s, median | spread | ratio to ours | agreement | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, outcome in sorted(outcomes.items(), key=lambda pair: -pair[1].median):
        rates = [turn.tokens_per_second for turn in outcome.turns]
        settings = outcome.facts["settings"]
        cells = [
            SYSTEMS[name].label,
            settings["weights"],
            settings["cache"],
            f"{outcome.median:.1f}",
            f"{min(rates):.0f} … {max(rates):.0f}",
            f"{_ratio(outcome, ours):.2f}" if ours else "",
            _agreement(outcome, ours) if ours else "",
            "-" if outcome.perplexity is None else f"{outcome.perplexity:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio(outcome: Outcome, ours: Outcome) -> float:
    pairs = zip(outcome.turns, ours.turns, strict=True)
    return statistics.median(theirs.tokens_per_second / own.tokens_per_second for theirs, own in pairs)


def _agreement(outcome: Outcome, ours: Outcome) -> str:
    theirs = outcome.turns[-1].answers
    same = sum(a == b for a, b in zip(theirs, ours.turns[-1].answers, strict=False))
    return f"{same} of {len(theirs)}"


def _perplexities(outcomes: Mapping[str, Outcome]) -> Sequence[str]:
    lines = [
        "Perplexity: of `benchmarks/peers/prose.txt` in windows of 512 tokens, the second half of each counted, as "
        "llama.cpp's tool does; each system's own, with the weights and cache of its row.",
    ]
    missing = {outcome.cannot: SYSTEMS[name].label for name, outcome in outcomes.items() if outcome.cannot}
    return [*lines, *(f"None for {label}: {why}." for why, label in missing.items())]


def _settings(outcome: Outcome) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in outcome.facts["versions"].items())
    return f"{versions}; {outcome.facts['settings']['options']}"


def _quietness(outcomes: Mapping[str, Outcome]) -> Sequence[str]:
    turns = [turn for outcome in outcomes.values() for turn in outcome.turns]
    idle, foreign = (max(getattr(turn, name) for turn in turns) for name in ("idle_cores", "foreign_cores"))
    return [
        f"Most that the waiting systems used together while another was measured: {idle:.2f} cores; most that the rest "
        f"of the machine used: {foreign:.2f} cores."
    ]
