"""The Step as tensors: one flat row of tokens. Knows where keys go and what each token may look at, not how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.blocks import BLOCK_TOKENS, blocks_of
from core.scheduler import Step


@dataclass(frozen=True, slots=True)
class Span:
    """One slice inside the flat row: its tokens look at the blocks of one sequence."""

    first: int  #: row of its first token
    last: int  #: one past the row of its last token
    context: int  #: tokens in the cache after this step: the position of its last token, plus one
    table: int  #: where its blocks begin in the batch's ``tables``

    @property
    def rows(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tensors, on the model's device."""

    input_ids: Tensor  #: int64 [1, rows]: the step's tokens, perhaps padded
    positions: Tensor  #: int64 [1, rows], counted from the start of each sequence
    slots: Tensor  #: int64 [tokens]: where each token's key and value go: block times BLOCK_TOKENS, plus place
    spans: tuple[Span, ...]
    tables: Tensor  #: int32 [blocks]: the blocks of each span, one span after the other
    copies: tuple[tuple[int, int], ...]  #: blocks to be copied before anything is written
    keep: Tensor  #: int64: the rows whose logits are wanted, perhaps padded
    row_counts: tuple[int, ...]  #: of ``keep``, how many belong to each slice


def padded(rows: int) -> int:
    """How many rows a float32 product has, so that each comes out the same to the last bit whatever their number.

    Measured: with MKL's kernels that holds for multiples of 4, from 12 on.
    """
    return max(12, -(-rows // 4) * 4)


def build_batch(step: Step, device: torch.device, *, pad: bool = False) -> Batch:
    """Lay the slices of a step one after the other.

    Args:
        pad: to ``padded`` rows; those behind the last are nobody's.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    keep: list[int] = []
    tables: list[int] = []
    spans, row_counts = [], []
    for piece in step.slices:
        sequence, first = piece.sequence, len(ids)
        blocks = sequence.blocks
        ids += sequence.tokens[piece.begin : piece.end]
        positions += range(piece.begin, piece.end)
        slots += [blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS for at in range(piece.begin, piece.end)]
        wanted = piece.tokens if sequence.predicts or sequence.wants_prompt_logits else int(piece.completes)
        keep += range(len(ids) - wanted, len(ids))
        row_counts.append(wanted)
        spans.append(Span(first, len(ids), piece.end, len(tables)))
        tables += blocks[: blocks_of(piece.end)]
    tokens, empty = len(ids), [0] * (padded(len(ids)) - len(ids) if pad else 0)
    if pad and keep:
        keep += [0] * (padded(len(keep)) - len(keep))
    packed = torch.tensor([ids + empty, positions + empty, slots + empty], dtype=torch.long).to(device)
    return Batch(
        input_ids=packed[0:1],
        positions=packed[1:2],
        slots=packed[2, :tokens],
        spans=tuple(spans),
        tables=torch.tensor(tables, dtype=torch.int32).to(device),
        copies=step.copies,
        keep=torch.tensor(keep, dtype=torch.long).to(device),
        row_counts=tuple(row_counts),
    )
