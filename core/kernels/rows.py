"""What stands between the products of a layer: tensors in, pointers out. Knows what ``rows.cpp`` reads."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from core.kernels.build import library

LANES = 16  #: sizes are multiples of it
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) of bfloat16 [..., size]."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    types = (_POINTER, _POINTER, _POINTER, _NUMBER, _NUMBER, ctypes.c_double, _NUMBER)
    _function("rms_norm", types)(
        *(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps, torch.get_num_threads())
    )
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
    types = (_POINTER, _NUMBER, _NUMBER, *[_POINTER] * 3, *[_NUMBER] * 4)
    _function("rotate", types)(
        *(x.data_ptr(), x.stride(1), x.stride(2), cos.contiguous().data_ptr(), sin.contiguous().data_ptr()),
        *(out.data_ptr(), heads, rows, size, torch.get_num_threads()),
    )
    return out


def silu_times(pairs: Tensor) -> Tensor:
    """SwiGLU's gate (arXiv:2002.05202): bfloat16 [..., size of gates, then size of what passes them] → [..., size]."""
    size = pairs.shape[-1] // 2
    out = torch.empty(*pairs.shape[:-1], size, dtype=pairs.dtype)
    _function("silu_times", (_POINTER, _POINTER, _NUMBER, _NUMBER, _NUMBER))(
        pairs.data_ptr(), out.data_ptr(), out.numel() // size, size, torch.get_num_threads()
    )
    return out


@cache
def _function(name: str, types: tuple[Any, ...]) -> Any:
    function = getattr(library(), name)
    function.argtypes, function.restype = types, None
    return function
