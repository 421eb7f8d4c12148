"""How close a resumed answer comes to the undisturbed one, on real weights: tokens, near-ties and log-probabilities.

    python -m benchmarks.resume --dtype float32 bfloat16

Greedy answers with top log-probabilities, computed alone; then each is taken up again at several places, all of them
together in full batches, as after a crash. A place where the undisturbed run's two likeliest logits are less than 1e-4
apart is a near-tie: either token counts as right there, and what follows it is not compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoTokenizer

from benchmarks.rig import describe_machine
from benchmarks.workload import RUNNING, english
from core.engine import Engine, EngineConfig
from core.models.source import resolve
from core.request import Choice, Emitted, FinishedEvent, Request, SamplingParams

NEAR_TIE = 1e-4
PARAMS = SamplingParams(max_tokens=64, logprobs=2, ignore_eos=True)


@dataclass(slots=True, eq=False)
class Closeness:
    """What was compared, and how it went."""

    resumed: int = 0  #: answers taken up
    equal: int = 0  #: of those, with every token the same
    near_ties: int = 0  #: of those, apart from a near-tie on
    prefixes: list[float] = field(default_factory=list)  #: share of the resumed tokens before the first other one
    worst_logprob: float = 0.0  #: largest difference, over positions with the same past


def main() -> None:
    """Measure each dtype, and print one line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub name")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["bfloat16", "float32", "int8"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--cuts", type=int, default=4, help="places at which each answer is taken up")
    arguments = parser.parse_args()
    ids = AutoTokenizer.from_pretrained(resolve(arguments.model))(english())["input_ids"]
    prompts = [tuple(ids[start : start + 60]) for start in range(0, 60 * arguments.prompts, 60)]
    print(
        "| dtype | resumed | equal | apart at a near-tie | median share before the first other token | worst logprob |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    for dtype in arguments.dtype:
        engine = Engine.load(EngineConfig(model=arguments.model, dtype=dtype, max_running=RUNNING))
        print(row(dtype, measure(engine, prompts, arguments.cuts)), flush=True)
    print(f"\n{describe_machine()}, {time.strftime('%Y-%m-%d')}, `python -m benchmarks.resume`")


def measure(engine: Engine, prompts: Sequence[Sequence[int]], cuts: int) -> Closeness:
    """Compute each prompt alone, then take all answers up at ``cuts`` places each, together."""
    requests = [Request(token_ids=tuple(prompt), params=PARAMS) for prompt in prompts]
    alone = [(request, run(engine, [(request, ())])[0]) for request in requests]
    taken_up = [
        (request, whole, cut)
        for request, whole in alone
        for cut in range(1, PARAMS.max_tokens, PARAMS.max_tokens // cuts)
    ]
    answers = run(engine, [(request, (until(whole, cut),)) for request, whole, cut in taken_up])
    closeness = Closeness()
    for (_, whole, cut), answer in zip(taken_up, answers, strict=True):
        compare(whole, answer, cut, closeness)
    return closeness


def until(whole: Choice, cut: int) -> Emitted:
    """What was published when the worker died."""
    return Emitted(token_ids=whole.token_ids[:cut], logprobs=(whole.logprobs or ())[:cut])


def compare(whole: Choice, answer: Choice, cut: int, closeness: Closeness) -> None:
    """Count one resumed answer."""
    closeness.resumed += 1
    for place in range(cut, len(whole.token_ids)):
        ours, theirs = (answer.logprobs or ())[place], (whole.logprobs or ())[place]
        if ours.token_id != theirs.token_id:
            (_, first), (_, second) = theirs.top[:2]
            closeness.near_ties += first - second < NEAR_TIE
            closeness.prefixes.append((place - cut) / (len(whole.token_ids) - cut))
            return
        closeness.worst_logprob = max(closeness.worst_logprob, abs(ours.logprob - theirs.logprob))
    closeness.equal += 1
    closeness.prefixes.append(1.0)


def run(engine: Engine, jobs: Sequence[tuple[Request, tuple[Emitted, ...]]]) -> list[Choice]:
    """Compute jobs together; the answers in their order."""
    for number, (request, emitted) in enumerate(jobs):
        engine.add(str(number), request, emitted)
    answers: dict[str, Choice] = {}
    while not engine.idle:
        found = (event for event in engine.step() if isinstance(event, FinishedEvent))
        answers |= {event.job_id: event.result.choices[0] for event in found}
    return [answers[str(number)] for number in range(len(jobs))]


def row(dtype: str, closeness: Closeness) -> str:
    share = statistics.median(closeness.prefixes)
    return (
        f"| {dtype} | {closeness.resumed} | {closeness.equal} | {closeness.near_ties} | {share:.2f} | "
        f"{closeness.worst_logprob:.1e} |"
    )


if __name__ == "__main__":
    main()
