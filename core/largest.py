"""The largest of many weights, without sorting them: which reach a sum. Tensors only; knows no parameter and no token.

A float that is not negative orders like its bit pattern. So one histogram over the upper 16 bits of the weights says in
which bucket the sum is reached, another over the lower 16 bits of that bucket says at which weight, and among equal
ones the place decides. Each is one pass over a row; of 49,152 weights that takes a quarter of a sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UPPER = 0x3F80 + 1  #: buckets of the upper halves of 0.0 to 1.0
_LOWER = 1 << 16


def reach(weights: Tensor, mass: Tensor, need: Tensor) -> Tensor:
    """Mark the largest weights of each row until their mass reaches ``need``; of equal ones the first in the row.

    A weight is marked exactly if the mass of all before it is less than ``need``.

    Args:
        weights: float32 [rows, vocab], from 0 to 1.
        mass: float64 [rows, vocab], what each counts.
        need: float64 [rows, 1], above 0.

    Returns:
        bool [rows, vocab]
    """
    bits = weights.contiguous().view(torch.int32)
    upper, lower = (bits >> 16).long(), (bits & (_LOWER - 1)).long()
    bucket, before = _border(upper, mass, need, _UPPER)
    inside = upper == bucket
    value, more = _border(lower, mass * inside, need - before, _LOWER)
    equal = inside & (lower == value)
    their_mass = mass * equal
    passed = before + more + their_mass.cumsum(-1) - their_mass
    return (upper > bucket) | (inside & (lower > value)) | (equal & (passed < need))


def _border(keys: Tensor, mass: Tensor, need: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """The lowest bucket that is needed, and the mass of those above it; [rows, 1] each."""
    held = torch.zeros(keys.shape[0], buckets + 1, dtype=mass.dtype, device=mass.device)
    held.scatter_add_(1, keys, mass)
    above = held.flip(1).cumsum(1).flip(1)[:, 1:]  # of each bucket: what lies in higher ones
    bucket = (above >= need).sum(1, keepdim=True).clamp_(max=buckets - 1)
    return bucket, above.gather(1, bucket)
