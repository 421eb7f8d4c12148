"""OpenVINO GenAI's continuous batching, as a peer. Runs in an environment of its own; knows nothing of Headrace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers import stdio

CACHE_GIB = 2
STEP_TOKENS = 512


class OpenVino:
    """A float16 GGUF file, multiplied in whatever the chip does fastest (bfloat16 where it can).

    It does not tell what its default cache is. On a chip with bfloat16 it answers and scores with it as with
    ``KV_CACHE_PRECISION=bf16``, to the last digit, and otherwise than with ``u8``.
    """

    def __init__(self, gguf: Path, running: int, threads: int, cache: str) -> None:
        scheduling = genai.SchedulerConfig()
        scheduling.cache_size = CACHE_GIB
        scheduling.max_num_seqs = running
        scheduling.max_num_batched_tokens = STEP_TOKENS
        scheduling.enable_prefix_caching = False
        scheduling.dynamic_split_fuse = True
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if cache != "default":
            options["KV_CACHE_PRECISION"] = cache
        self._pipeline = genai.ContinuousBatchingPipeline(gguf, scheduling, "CPU", options)
        self._next_id = 0
        self.versions: Mapping[str, str] = {"openvino-genai": genai.__version__, "openvino": ov.__version__}
        self.settings: Mapping[str, Any] = {
            "weights": "float16, products in bfloat16 where the chip has it",
            "cache": "its default" if cache == "default" else cache,
            "options": f"cache_size={CACHE_GIB}, max_num_seqs={running}, max_num_batched_tokens={STEP_TOKENS}, "
            f"enable_prefix_caching=False, dynamic_split_fuse=True, {options}",
        }

    def run(self, items: Sequence[stdio.Item]) -> list[list[int]]:
        handles = [self._add(item.token_ids, max_new_tokens=item.answer_tokens, ignore_eos=True) for item in items]
        self._drain()
        return [handle.read_all()[0].generated_ids for handle in handles]

    def perplexity(self, prose: stdio.Prose) -> float:
        asked = {"max_new_tokens": 1, "ignore_eos": True, "echo": True, "logprobs": 1}
        handles = [self._add(window, **asked) for window in prose.windows]
        self._drain()
        read = [handle.read_all()[0].generated_log_probs for handle in handles]
        return stdio.perplexity_of([row[1 : len(window)] for window, row in zip(prose.windows, read, strict=True)])

    def _add(self, token_ids: Sequence[int], **options: Any) -> Any:
        config = genai.GenerationConfig(do_sample=False, apply_chat_template=False, **options)
        self._next_id += 1
        ids = ov.Tensor(np.array([token_ids], dtype=np.int64))
        return self._pipeline.add_request(self._next_id, ids, config)

    def _drain(self) -> None:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def main() -> None:
    parser = stdio.parser(__doc__)
    parser.add_argument("--cache", default="default", help="KV_CACHE_PRECISION: bf16, f16, u8 …")
    given = parser.parse_args()
    stdio.serve(lambda: OpenVino(given.model, given.running, given.threads, given.cache), given.workload)


if __name__ == "__main__":
    main()
