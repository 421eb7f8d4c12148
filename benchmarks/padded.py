"""Static batches as users of Transformers run them: ``generate``, left-padded, until the longest answer is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Item(Protocol):
    """One request."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def answer_tokens(self) -> int: ...


def generate_padded(model: Any, items: Sequence[Item]) -> list[list[int]]:
    """Answer a batch; of each answer the tokens that were asked for."""
    longest = max(len(item.token_ids) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, longest - len(item.token_ids) :] = torch.tensor(item.token_ids)
        mask[row, longest - len(item.token_ids) :] = 1
    tokens = max(item.answer_tokens for item in items)
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
        )
    rows: list[list[int]] = made[:, longest:].tolist()
    return [row[: item.answer_tokens] for row, item in zip(rows, items, strict=True)]
