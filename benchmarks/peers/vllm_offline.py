"""vLLM's offline engine, as a peer. Runs in an environment of its own; knows nothing of Headrace."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import stdio

LONGEST = 1024
CACHE_GIB = 2


class Vllm:
    """Compiled, in this process: an engine process of its own would poll while others are measured."""

    def __init__(self, folder: Path, running: int, threads: int) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        import vllm  # reads the environment

        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(folder),
            dtype="bfloat16",
            max_num_seqs=running,
            max_model_len=LONGEST,
            enable_prefix_caching=False,
        )
        self.versions: Mapping[str, str] = {"vllm": vllm.__version__}
        self.settings: Mapping[str, Any] = {
            "weights": "bfloat16",
            "cache": "bfloat16",
            "options": f"max_num_seqs={running}, max_model_len={LONGEST}, enable_prefix_caching=False, compiled, "
            f"VLLM_CPU_KVCACHE_SPACE={CACHE_GIB}, VLLM_ENABLE_V1_MULTIPROCESSING=0, {threads} threads",
        }

    def run(self, items: Sequence[stdio.Item]) -> list[list[int]]:
        params = [self._params(temperature=0, max_tokens=item.answer_tokens, ignore_eos=True) for item in items]
        asked = [{"prompt_token_ids": item.token_ids} for item in items]
        return [list(one.outputs[0].token_ids) for one in self._llm.generate(asked, params, use_tqdm=False)]

    def perplexity(self, prose: stdio.Prose) -> float:
        params = self._params(temperature=0, max_tokens=1, prompt_logprobs=0)
        asked = [{"prompt_token_ids": window} for window in prose.windows]
        made = self._llm.generate(asked, params, use_tqdm=False)
        rows = []
        for window, one in zip(prose.windows, made, strict=True):
            given = zip(window[1:], one.prompt_logprobs[1:], strict=True)
            rows.append([logprobs[token_id].logprob for token_id, logprobs in given])
        return stdio.perplexity_of(rows)


def main() -> None:
    given = stdio.parser(__doc__).parse_args()
    stdio.serve(lambda: Vllm(given.model, given.running, given.threads), given.workload)


if __name__ == "__main__":
    main()
