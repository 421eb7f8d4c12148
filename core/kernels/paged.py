"""Calls the compiled attention: tensors in, pointers out. Knows the layout that ``attention.cpp`` reads."""

from __future__ import annotations

import torch
from torch import Tensor

from core.blocks import BLOCK_TOKENS
from core.kernels.build import library
from core.kernels.calls import THREADS, call

MOST_QUERIES = 48  #: of one piece of work
MOST_HEAD_SIZE = 256


def kernel(query: Tensor, pool: Tensor) -> str | None:
    """The name of our function; None where plain torch has to do.

    Args:
        query: [heads, rows, head_size].
        pool: of keys, [blocks, kv_heads, head_size, BLOCK_TOKENS], or in eight bits uint8 [blocks, kv_heads, bytes].
    """
    heads, _, head_size = query.shape
    if (
        pool.device.type != "cpu"
        or head_size % 16
        or head_size > MOST_HEAD_SIZE
        or heads // pool.shape[1] > MOST_QUERIES
    ):
        return None
    name = {torch.float32: "attend_float", torch.bfloat16: "attend_bfloat16"}.get(query.dtype)
    if name is None or (found := library()) is None:
        return None
    name += "_int8" * (pool.dtype is torch.uint8)
    return name if hasattr(found, name) else None


def part_bytes(head_size: int) -> int:
    """Of one block of one key-value head in eight bits: a number each, and what one is worth for each token."""
    return BLOCK_TOKENS * (head_size + 4)


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


def layout(slots: Tensor, spans: Tensor, tables: Tensor, work: Tensor) -> Tensor:
    """What is the same in all layers of a pass, for as long as these tensors live.

    Args:
        slots: int64 [tokens].
        spans: int32 [spans, 4].
        tables: int32 [blocks].
        work: int32 [pieces, 4].

    Returns:
        int64 [6].
    """
    return torch.tensor([len(slots), len(work), *(each.data_ptr() for each in (slots, spans, tables, work))])


def attend(
    function: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    tokens: int,
    layout: Tensor,
    look: tuple[float, float, int],
) -> Tensor:
    """Store a step's keys and values, and attend.

    Args:
        function: of ``kernel``.
        tensors: query [heads, rows, head_size], keys and values [kv_heads, rows, head_size], and both pools.
        tokens: rows that are not padding.
        layout: of ``layout``.
        look: scale, softcap (0: none), window (0: none).

    Returns:
        [rows, heads, head_size]; rows behind the last token are zeros.
    """
    query, keys, values, key_pool, value_pool = (_dense(tensor) for tensor in tensors)
    heads, rows, head_size = query.shape
    out = torch.empty(rows, heads, head_size, dtype=query.dtype)
    if rows > tokens:
        out[tokens:] = 0
    scale, softcap, window = look
    strides = (tensor.stride(axis) for tensor in (query, keys, values) for axis in (0, 1))
    shape = (heads, keys.shape[0], head_size, window, float(scale), float(softcap))
    call(function, query, keys, values, key_pool, value_pool, out, *strides, *shape, layout, THREADS)
    return out


def _dense(tensor: Tensor) -> Tensor:
    """The numbers of a head are neighbours."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
