"""What stands between the products of a layer: tensors in, pointers out. Knows what ``rows.cpp`` reads."""

from __future__ import annotations

import torch
from torch import Tensor

from core.kernels.build import library
from core.kernels.calls import THREADS, call

LANES = 16  #: sizes are multiples of it


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) of bfloat16 [..., size], or of parts of rows: [1, rows, parts, size]."""
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.dim() == 4 and len(x) == 1 and x.stride(-1) == 1:
        shape, strides = (x.shape[1], x.shape[2], size), (x.stride(1), x.stride(2))
    else:
        x = x.contiguous()
        shape, strides = (x.numel() // size, 1, size), (size, 0)
    call("rms_norm", x, *strides, weight, out, *shape, eps, THREADS)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864), halves rotated.

    Args:
        x: bfloat16 [1, heads, rows, size].
        cos: bfloat16 [1, rows, size]; sin alike.
    """
    _, heads, rows, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    strides = (x.stride(1), x.stride(2))
    call("rotate", x, *strides, cos.contiguous(), sin.contiguous(), out, heads, rows, size, THREADS)
    return out


def silu_times(pairs: Tensor) -> Tensor:
    """SwiGLU's gate (arXiv:2002.05202): bfloat16 [..., size of gates, then size of what passes them] → [..., size]."""
    size = pairs.shape[-1] // 2
    out = torch.empty(*pairs.shape[:-1], size, dtype=pairs.dtype)
    call("silu_times", pairs, out, out.numel() // size, size, THREADS)
    return out


def add(x: Tensor, y: Tensor) -> Tensor:
    """Sums of two bfloat16 [..., size] of the same shape and without gaps."""
    out, size = torch.empty_like(x), x.shape[-1]
    call("add", x, y, out, x.numel() // size, size, THREADS)
    return out


def argmax(x: Tensor) -> Tensor:
    """Where the largest of each row is, of equal ones the first; of a row that holds no number any place.

    Args:
        x: float32 [rows, size].

    Returns:
        int64 [rows]
    """
    if x.device.type != "cpu" or x.dtype is not torch.float32 or x.shape[1] % LANES or library() is None:
        return torch.argmax(x, dim=-1)
    x = x.contiguous()
    out = torch.empty(len(x), dtype=torch.int64)
    call("argmax", x, out, *x.shape, THREADS)
    return out
