"""The Step as tensors: one flat row of tokens. Knows where keys go and what each token may look at, not how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.scheduler import Step


@dataclass(frozen=True, slots=True)
class Span:
    """One slice inside the flat row: its tokens look at one run of cache slots."""

    first: int  #: row of its first token
    last: int  #: one past the row of its last token
    start: int  #: cache slot of its sequence's position 0
    context: int  #: slots in use after this step: the position of its last token, plus one

    @property
    def rows(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tensors, on the model's device."""

    input_ids: Tensor  #: int64 [1, tokens]
    positions: Tensor  #: int64 [1, tokens], counted from the start of each sequence
    slots: Tensor  #: int64 [tokens]: where each token's key and value go
    spans: tuple[Span, ...]
    keep: Tensor  #: int64 [rows]: the tokens whose logits are wanted
    row_counts: tuple[int, ...]  #: of ``keep``, how many belong to each slice


def build_batch(step: Step, device: torch.device) -> Batch:
    """Lay the slices of a step one after the other."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    keep: list[int] = []
    spans, row_counts = [], []
    for piece in step.slices:
        sequence, first = piece.sequence, len(ids)
        assert sequence.run is not None
        start = sequence.run.start
        ids += sequence.tokens[piece.begin : piece.end]
        positions += range(piece.begin, piece.end)
        slots += range(start + piece.begin, start + piece.end)
        wanted = piece.tokens if sequence.predicts or sequence.wants_prompt_logits else int(piece.completes)
        keep += range(len(ids) - wanted, len(ids))
        row_counts.append(wanted)
        spans.append(Span(first, len(ids), start, piece.end))
    packed = torch.tensor([ids, positions, slots], dtype=torch.long).to(device)
    return Batch(
        input_ids=packed[0:1],
        positions=packed[1:2],
        slots=packed[2],
        spans=tuple(spans),
        keep=torch.tensor(keep, dtype=torch.long).to(device),
        row_counts=tuple(row_counts),
    )
