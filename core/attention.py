"""Keys and values of all sequences, and attention over them: the one function of Transformers' models that is ours.

The modelling code stays Transformers' own; it calls ``attend`` with the whole step as one flat row of tokens. Each row
is computed over its own sequence's blocks alone, so what a sequence says does not depend on who shares its step. On a
processor our own kernel does that (``core/kernels``); here is the same in torch's operators, for cards and for want of
a compiler.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from core.batch import Batch, Span
from core.blocks import BLOCK_TOKENS
from core.errors import EngineError
from core.kernels import paged

NAME = "headrace"  #: under this name Transformers finds ``attend``

#: Keyword arguments of Transformers' layers that change nothing here, whatever their value.
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "position_embeddings", "logits_to_keep"})


class UnknownArgument(EngineError):
    """A model hands its attention something we do not compute; its check at load turns this into a refusal."""

    def __init__(self, argument: str) -> None:
        super().__init__(f"its attention takes {argument!r}, which Headrace does not compute")
        self.argument = argument


class NoKernel(EngineError):
    """Keys and values of eight bits, and nothing that reads them; the check at load turns this into a refusal."""

    def __init__(self, group: int, head_size: int) -> None:
        super().__init__(
            "keys and values in eight bits need AVX512_VNNI, a C++ compiler, "
            f"at most {paged.MOST_QUERIES} queries a key ({group} here) "
            f"and heads of a multiple of 16 numbers, at most {paged.MOST_HEAD_SIZE} ({head_size} here)"
        )


class KVCache:
    """One pool of key blocks and one of value blocks a layer, made when the layer first stores something.

    The memory is reserved and not touched: the system commits it as sequences grow.
    """

    def __init__(self, blocks: int, *, eight_bits: bool = False) -> None:
        self.blocks = blocks
        self.eight_bits = eight_bits
        #: keys [blocks, kv_heads, head_size, BLOCK_TOKENS], values [blocks, kv_heads, BLOCK_TOKENS, head_size]; in
        #: eight bits uint8 [blocks, kv_heads, bytes] each
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def bytes_per_token(self, dtype: torch.dtype, *, eight_bits: bool) -> int:
        """Of all layers that have stored something, were they kept like this."""
        shapes = [keys.shape[1:3] for keys, _ in self.layers.values()]
        if eight_bits:
            return sum(2 * heads * paged.part_bytes(size) // BLOCK_TOKENS for heads, size in shapes)
        return sum(2 * heads * size * dtype.itemsize for heads, size in shapes)

    def pools(self, layer: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's pools, for keys [kv_heads, tokens, head_size]."""
        found = self.layers.get(layer)
        if found is None:
            kv_heads, _, head_size = keys.shape
            if self.eight_bits:
                shape, dtype = (self.blocks, kv_heads, paged.part_bytes(head_size)), torch.uint8
                found = (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
            else:
                pool = torch.empty(self.blocks, kv_heads, head_size, BLOCK_TOKENS, dtype=keys.dtype, device=keys.device)
                found = (pool, torch.empty_like(pool).view(self.blocks, kv_heads, BLOCK_TOKENS, head_size))
            self.layers[layer] = found
        return found

    def copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copy whole blocks, one after the other."""
        for source, target in copies:
            for keys, values in self.layers.values():
                keys[target] = keys[source]
                values[target] = values[source]


@dataclass(slots=True, eq=False)
class Pass:
    """One pass of the model: handed through Transformers' layers to ``attend`` as the argument ``headrace``.

    What all layers share is made once.
    """

    batch: Batch
    cache: KVCache
    spans: Tensor = field(init=False)  #: int32 [spans, 4]: first row, rows, context, table
    _layouts: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[Span, int | None], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = [(span.first, span.rows, span.context, span.table) for span in self.batch.spans]
        self.spans = torch.tensor(rows, dtype=torch.int32)

    def layout(self, heads: int, kv_heads: int) -> Tensor:
        """What our kernel knows of the pass in a layer of this shape; see ``paged.layout``."""
        found = self._layouts.get((heads, kv_heads))
        if found is None:
            work = paged.pieces_of(self.spans, heads, kv_heads)
            layout = paged.layout(self.batch.slots, self.spans, self.batch.tables, work)
            found = self._layouts[heads, kv_heads] = (layout, work)
        return found[0]

    @property
    def shapes(self) -> Collection[tuple[int, int]]:
        """Of all layers that have attended: heads and key-value heads."""
        return self._layouts.keys()

    def mask(self, span: Span, window: int | None, like: Tensor) -> Tensor:
        """What may not be seen, as -inf to be added: [rows, context]."""
        found = self._masks.get((span, window))
        if found is None:
            found = self._masks[span, window] = _mask(span, window, like)
        return found


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers' layers call it, over our cache.

    Args:
        module: the layer; its ``layer_idx`` names its pool.
        query: [1, heads, tokens, head_size]; key and value alike with kv_heads.
        attention_mask: None; which token sees which follows from the batch.
        arguments: scaling, sliding_window, softcap, and ``headrace``, the Pass.

    Returns:
        [1, tokens, heads, head_size].

    Raises:
        UnknownArgument: there is more to this attention than we compute.
    """
    current: Pass = arguments["headrace"]
    look = _read_look(module, attention_mask, arguments, query)
    pools = current.cache.pools(_layer(module), key[0])
    tensors = (query[0], key[0], value[0], *pools)
    if (function := paged.kernel(query[0], pools[0])) is not None:
        layout = current.layout(query.shape[1], key.shape[1])
        of_layer = (look.scale, look.softcap or 0.0, look.window or 0)
        out = paged.attend(function, tensors, len(current.batch.slots), layout, of_layer)
    elif current.cache.eight_bits:
        raise NoKernel(query.shape[1] // key.shape[1], query.shape[3])
    else:
        out = _attend_plainly(current, tensors, look)
    return out.unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class _Look:
    """How a layer looks back."""

    scale: float
    window: int | None
    softcap: float | None


def _read_look(module: nn.Module, attention_mask: Tensor | None, arguments: dict[str, Any], query: Tensor) -> _Look:
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    unknown = given - _HARMLESS - {"headrace", "scaling", "sliding_window", "softcap", "dropout"}
    if attention_mask is not None:
        unknown.add("attention_mask")
    if arguments.get("dropout"):
        unknown.add("dropout")
    if unknown:
        raise UnknownArgument(min(unknown))
    scale = arguments.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return _Look(scale, arguments.get("sliding_window"), arguments.get("softcap"))


def _layer(module: nn.Module) -> int:
    return int(module.layer_idx)  # type: ignore[arg-type]


def _attend_plainly(current: Pass, tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], look: _Look) -> Tensor:
    """What the kernel does, in torch's operators; [tokens, heads, head_size]."""
    query, key, value, keys, values = tensors
    blocks, places = current.batch.slots // BLOCK_TOKENS, current.batch.slots % BLOCK_TOKENS
    keys[blocks, :, :, places] = key[:, : len(blocks)].transpose(0, 1)
    values[blocks, :, places] = value[:, : len(blocks)].transpose(0, 1)
    grouped = query.unflatten(0, (key.shape[0], -1))  # query heads that share keys together
    pieces = [
        _attend_span(current, span, grouped[:, :, span.first : span.last], (keys, values), look)
        for span in current.batch.spans
    ]
    padding = query.new_zeros(query.shape[1] - len(blocks), *pieces[0].shape[1:])
    return torch.cat([*pieces, padding]).flatten(1, 2)


def _attend_span(current: Pass, span: Span, query: Tensor, pools: tuple[Tensor, Tensor], look: _Look) -> Tensor:
    """One slice over its own keys.

    Args:
        query: [kv_heads, group, rows, head_size].
        pools: of the layer.

    Returns:
        [rows, kv_heads, group, head_size].
    """
    kv_heads, group, rows, head_size = query.shape
    table = current.batch.tables[span.table : span.table - (-span.context // BLOCK_TOKENS)]
    keys = pools[0][table].permute(1, 0, 3, 2).reshape(kv_heads, -1, head_size)[:, : span.context]
    values = pools[1][table].transpose(0, 1).reshape(kv_heads, -1, head_size)[:, : span.context]
    mask = None if rows == 1 and look.window is None else current.mask(span, look.window, query)
    if rows == 1 and look.softcap is None:
        query = query.squeeze(2).unsqueeze(0)  # the group's heads as rows of one head: keys are read once
        return scaled_dot_product_attention(query, keys[None], values[None], attn_mask=mask, scale=look.scale)
    shape = (kv_heads, group, span.context, head_size)
    keys, values = keys.unsqueeze(1).expand(shape), values.unsqueeze(1).expand(shape)
    if look.softcap is not None:
        return _softcapped(query, keys, values, mask, look).permute(2, 0, 1, 3)
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=look.scale).permute(2, 0, 1, 3)


def _softcapped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, look: _Look) -> Tensor:
    assert look.softcap is not None
    scores = torch.matmul(query, keys.transpose(2, 3)) * look.scale
    scores = torch.tanh(scores / look.softcap) * look.softcap
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), values)


def _mask(span: Span, window: int | None, like: Tensor) -> Tensor:
    rows = torch.arange(span.context - span.rows, span.context, device=like.device).unsqueeze(1)
    columns = torch.arange(span.context, device=like.device).unsqueeze(0)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
