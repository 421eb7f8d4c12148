"""Transformers' own ways of generating, as peers: one at a time, static batches, continuous batching."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.padded import generate_padded
from benchmarks.peers import stdio

STEP_TOKENS = 512
PAGE_TOKENS = 32
CACHE_TOKENS = 32 * 1024


class Transformers:
    """What the three have in common: the model, and plain scoring."""

    def __init__(self, given: argparse.Namespace, options: str) -> None:
        torch.set_num_threads(given.threads)
        dtype = getattr(torch, given.dtype)
        self._model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).eval()
        self.versions: Mapping[str, str] = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.settings: Mapping[str, Any] = {"weights": given.dtype, "cache": given.dtype, "options": options}

    def perplexity(self, prose: stdio.Prose) -> float:
        rows = []
        for window in prose.windows:
            ids = torch.tensor([window])
            with torch.inference_mode():
                logprobs = self._model(ids).logits[0, :-1].float().log_softmax(-1)
            rows.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
        return stdio.perplexity_of(rows)


class Static(Transformers):
    """``model.generate`` as its users call it, left-padded; a batch runs until its longest answer is done."""

    def __init__(self, given: argparse.Namespace, rows: int) -> None:
        super().__init__(given, f"generate, left-padded batches of {rows}, useful tokens only")
        self._rows = rows

    def run(self, items: Sequence[stdio.Item]) -> list[list[int]]:
        return [
            answer
            for first in range(0, len(items), self._rows)
            for answer in generate_padded(self._model, items[first : first + self._rows])
        ]


class Continuous(Transformers):
    """``init_continuous_batching``; its thread is started for each run, so that it does not spin between them."""

    def __init__(self, given: argparse.Namespace) -> None:
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=CACHE_TOKENS // PAGE_TOKENS,
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=given.running,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        super().__init__(
            given,
            f"init_continuous_batching, sdpa, max_batch_tokens={STEP_TOKENS}, "
            f"max_requests_per_batch={given.running}, page_size={PAGE_TOKENS}, allow_block_sharing=False",
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._config, self._greedy = config, greedy
        self._model.set_attn_implementation("sdpa")

    def run(self, items: Sequence[stdio.Item]) -> list[list[int]]:
        answers: dict[str, list[int]] = {}
        with self._model.continuous_batching_context_manager(
            generation_config=self._greedy, continuous_batching_config=self._config, persistent_manager=True
        ) as manager:
            for number, item in enumerate(items):
                manager.add_request(item.token_ids, request_id=f"r{number}", max_new_tokens=item.answer_tokens)
            while len(answers) < len(items):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise SystemExit("continuous batching has ended by itself")
                if result is not None and result.is_finished():
                    answers[result.request_id] = list(result.generated_tokens)
        return [answers[f"r{number}"] for number in range(len(items))]


def main() -> None:
    parser = stdio.parser(__doc__)
    parser.add_argument("--way", choices=["single", "static", "continuous"], required=True)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    ways: dict[str, Callable[[], stdio.Peer]] = {
        "single": lambda: Static(given, 1),
        "static": lambda: Static(given, given.running),
        "continuous": lambda: Continuous(given),
    }
    stdio.serve(ways[given.way], given.workload)


if __name__ == "__main__":
    main()
