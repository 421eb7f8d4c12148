"""Calls the compiled attention: tensors in, pointers out. Knows the layout that ``attention.cpp`` reads."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from core.kernels.build import library

MOST_QUERIES = 48  #: of one piece of work
MOST_HEAD_SIZE = 256

_POINTERS = ("query", "keys", "values", "key_pool", "value_pool", "out")
_NUMBERS = ("query_head", "query_row", "key_head", "key_row", "value_head", "value_row")
_SHAPE = ("heads", "kv_heads", "head_size", "window")


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_NUMBERS, *_SHAPE)),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("tokens", "pieces", "threads")),
        *((name, ctypes.c_void_p) for name in ("slots", "spans", "tables", "work")),
    )


def kernel(pool: Tensor, heads: int) -> Any | None:
    """The function for keys [blocks, kv_heads, head_size, BLOCK_TOKENS]; None where plain torch has to do."""
    if pool.device.type != "cpu":
        return None
    head_size, group = pool.shape[2], heads // pool.shape[1]
    if head_size % 16 or head_size > MOST_HEAD_SIZE or group > MOST_QUERIES or (found := library()) is None:
        return None
    return {torch.float32: found.attend_float, torch.bfloat16: found.attend_bfloat16}.get(pool.dtype)


def pieces_of(spans: Tensor, heads: int, kv_heads: int) -> Tensor:
    """What the threads share among them: int32 [pieces, 4] of span, first row, rows and key-value head.

    Args:
        spans: int32 [spans, 4] of first row, rows, context and table.
    """
    most = MOST_QUERIES // (heads // kv_heads)
    work = [
        (number, row, min(most, rows - row), head)
        for number, (_, rows, _, _) in enumerate(spans.tolist())
        for row in range(0, rows, most)
        for head in range(kv_heads)
    ]
    work.sort(key=lambda piece: -piece[2])  # the longest first: the threads end together
    return torch.tensor(work, dtype=torch.int32)


def call(
    function: Any,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    layout: tuple[Tensor, Tensor, Tensor, Tensor],
    look: tuple[float, float, int],
) -> Tensor:
    """Store a step's keys and values, and attend.

    Args:
        function: of ``kernel``.
        tensors: query [heads, rows, head_size], keys and values [kv_heads, rows, head_size], and both pools.
        layout: slots int64 [tokens], spans int32 [spans, 4], tables int32 [blocks], work int32 [pieces, 4].
        look: scale, softcap (0: none), window (0: none).

    Returns:
        [rows, heads, head_size]; rows behind the last token are zeros.
    """
    query, keys, values, key_pool, value_pool = (_dense(tensor) for tensor in tensors)
    slots, spans, tables, work = layout
    heads, rows, head_size = query.shape
    tokens = len(slots)
    out = torch.empty(rows, heads, head_size, dtype=query.dtype)
    out[tokens:] = 0
    scale, softcap, window = look
    arguments = _Arguments(
        *(tensor.data_ptr() for tensor in (query, keys, values, key_pool, value_pool, out)),
        *(tensor.stride(axis) for tensor in (query, keys, values) for axis in (0, 1)),
        *(heads, keys.shape[0], head_size, window, scale, softcap, tokens, len(work), torch.get_num_threads()),
        *(tensor.data_ptr() for tensor in (slots, spans, tables, work)),
    )
    function(ctypes.byref(arguments))
    return out


def _dense(tensor: Tensor) -> Tensor:
    """The numbers of a head are neighbours."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
