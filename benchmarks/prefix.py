"""What the prefix cache is worth: requests that share a beginning, with it and without it, taking turns.

    python -m benchmarks.prefix --repeats 5

64 requests of a shared beginning of 400 tokens and 16 of their own, 16 answer tokens each, at most 32 at once. Each
round has a salt of its own, so that nothing is known from the round before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence

from benchmarks.rig import describe_machine
from benchmarks.workload import RUNNING, english
from core.request import Request, SamplingParams
from core.threads import keep_calm

REQUESTS, SHARED, OWN, ANSWER = 64, 400, 16, 16


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub name")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "int8"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    keep_calm(arguments.dtype, os.environ)
    from transformers import AutoTokenizer

    from core.engine import Engine, EngineConfig
    from core.models.source import resolve

    ids = AutoTokenizer.from_pretrained(resolve(arguments.model))(english())["input_ids"]
    engines = {
        cached: Engine.load(
            EngineConfig(model=arguments.model, dtype=arguments.dtype, max_running=RUNNING, prefix_cache=cached)
        )
        for cached in (True, False)
    }
    rates: dict[bool, list[float]] = {True: [], False: []}
    for number in range(-1, arguments.repeats):  # the first warms up
        for cached, engine in engines.items():
            start = time.perf_counter()
            engine.generate(requests(ids, salt=f"round-{number}"))
            if number >= 0:
                rates[cached].append(REQUESTS * ANSWER / (time.perf_counter() - start))
    ratios = [with_it / without for with_it, without in zip(rates[True], rates[False], strict=True)]
    print("| prefix cache | tokens/s, median | spread |\n|---|---|---|")
    for cached, each in rates.items():
        print(f"| {'on' if cached else 'off'} | {statistics.median(each):.0f} | {min(each):.0f} … {max(each):.0f} |")
    print(f"\n{statistics.median(ratios):.2f} times as many, median of {len(ratios)} pairs; ", end="")
    print(f"{arguments.dtype}, {describe_machine()}, {time.strftime('%Y-%m-%d')}, `python -m benchmarks.prefix`")


def requests(ids: Sequence[int], salt: str) -> list[Request]:
    """The round's requests: one beginning, ends of their own."""
    ends = (ids[SHARED + OWN * n : SHARED + OWN * (n + 1)] for n in range(REQUESTS))
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    return [Request(token_ids=(*ids[:SHARED], *end), params=params, cache_salt=salt) for end in ends]


if __name__ == "__main__":
    main()
