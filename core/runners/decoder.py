"""One loaded decoder: a step in, logits out. Knows no job's parameters and no text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.attention import KVCache, Pass
from core.batch import Batch


class DecoderRunner:
    """Sequences that grow, computed by a Transformers model whose attention is ours."""

    def __init__(self, model: Any, cache: KVCache) -> None:
        self._model = model
        self._cache = cache

    @property
    def device(self) -> torch.device:
        """Where the batch has to be."""
        device: torch.device = self._model.device
        return device

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Pass a step through the model; float32 [rows, vocab], the logits that are wanted."""
        self._cache.copy(batch.copies)
        output = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=batch.keep,
            headrace=Pass(batch, self._cache),
        )
        logits: Tensor = output.logits[0, : sum(batch.row_counts)]
        return logits.float()
