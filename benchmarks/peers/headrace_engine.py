"""Our own bare engine, ``core.engine.Engine``, run as the peers are: no queue, no HTTP."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import stdio
from core.request import FinishedEvent, Request, SamplingParams
from core.threads import keep_calm


class HeadraceEngine:
    """The engine as a worker loads it."""

    def __init__(self, folder: Path, running: int, threads: int, dtype: str) -> None:
        keep_calm(dtype, os.environ)
        from core.engine import Engine, EngineConfig

        self._engine = Engine.load(EngineConfig(model=str(folder), dtype=dtype, threads=threads, max_running=running))
        self._rounds = itertools.count()
        self.versions: Mapping[str, str] = {
            name: importlib.metadata.version(name) for name in ("headrace", "torch", "transformers")
        }
        self.settings: Mapping[str, Any] = {
            "weights": dtype,
            "cache": dtype,
            "options": f"max_running={running}, threads={threads}, a cache_salt each round, the rest as it comes",
        }

    def run(self, items: Sequence[stdio.Item]) -> list[list[int]]:
        engine, waiting = self._engine, list(enumerate(items))
        answers: dict[str, list[int]] = {}
        salt = f"round-{next(self._rounds)}"  # no prompt is known from the round before
        while len(answers) < len(items):
            while waiting and engine.room:
                number, item = waiting.pop(0)
                params = SamplingParams(max_tokens=item.answer_tokens, ignore_eos=True)
                request = Request(token_ids=tuple(item.token_ids), params=params, cache_salt=salt)
                engine.add(str(number), request)
            for event in engine.step():
                if isinstance(event, FinishedEvent):
                    answers[event.job_id] = list(event.result.choices[0].token_ids)
        return [answers[str(number)] for number in range(len(items))]

    def perplexity(self, prose: stdio.Prose) -> float:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        requests = [Request(token_ids=tuple(window), params=params) for window in prose.windows]
        return stdio.perplexity_of(
            [
                [token.logprob for token in result.prompt_logprobs[1:] if token is not None]
                for result in self._engine.generate(requests)
                if result.prompt_logprobs is not None
            ]
        )


def main() -> None:
    parser = stdio.parser(__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    stdio.serve(lambda: HeadraceEngine(given.model, given.running, given.threads, given.dtype), given.workload)


if __name__ == "__main__":
    main()
