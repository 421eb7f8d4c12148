"""Keys and values of all sequences, and attention over them: the one function of Transformers' models that is ours.

The modelling code stays Transformers' own; it calls ``attend`` with the whole step as one flat row of tokens. Each span
is computed alone over its own keys, so what a sequence says does not depend on who shares its step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from core.batch import Batch, Span
from core.errors import EngineError

NAME = "headrace"  #: under this name Transformers finds ``attend``

#: Keyword arguments of Transformers' layers that change nothing here, whatever their value.
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "position_embeddings", "logits_to_keep"})


class UnknownArgument(EngineError):
    """A model hands its attention something we do not compute; its check at load turns this into a refusal."""

    def __init__(self, argument: str) -> None:
        super().__init__(f"its attention takes {argument!r}, which Headrace does not compute")
        self.argument = argument


class KVCache:
    """One pool of keys and values a layer, made when the layer first stores something.

    The memory is reserved and not touched: the system commits it as sequences grow.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens  #: slots a layer
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  #: each [kv_heads, slots, head_size]

    @property
    def bytes_per_token(self) -> int:
        """Of all layers that have stored something."""
        return sum(pool.element_size() * pool[:, 0].numel() for pools in self.layers.values() for pool in pools)

    def store(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values, and return the layer's pools.

        Args:
            slots: int64 [tokens].
            keys: [kv_heads, tokens, head_size]; values alike.
        """
        pools = self.layers.get(layer)
        if pools is None:
            pools = self.layers[layer] = (self._pool(keys), self._pool(values))
        pools[0].index_copy_(1, slots, keys)
        pools[1].index_copy_(1, slots, values)
        return pools

    def _pool(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape[0], self.tokens, like.shape[2], dtype=like.dtype, device=like.device)


@dataclass(slots=True, eq=False)
class Pass:
    """One pass of the model: handed through Transformers' layers to ``attend`` as the argument ``headrace``."""

    batch: Batch
    cache: KVCache
    masks: dict[tuple[Span, int | None], Tensor] = field(default_factory=dict)  #: the same in every layer

    def mask(self, span: Span, window: int | None, like: Tensor) -> Tensor:
        """What may not be seen, as -inf to be added: [rows, context], or [rows, window] for the last of it."""
        found = self.masks.get((span, window))
        if found is None:
            found = self.masks[span, window] = _mask(span, window, like)
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
    look = _read_look(module, attention_mask, arguments)
    heads, kv_heads = query.shape[1], key.shape[1]
    keys, values = current.cache.store(_layer(module), current.batch.slots, key[0], value[0])
    grouped = query[0].view(kv_heads, heads // kv_heads, -1, query.shape[3])  # query heads that share keys together
    pieces = [
        _attend_span(current, span, grouped[:, :, span.first : span.last], keys, values, look)
        for span in current.batch.spans
    ]
    return torch.cat(pieces).view(1, -1, heads, values.shape[2]), None


@dataclass(frozen=True, slots=True)
class _Look:
    """How a layer looks back."""

    scale: float | None
    window: int | None
    softcap: float | None


def _read_look(module: nn.Module, attention_mask: Tensor | None, arguments: dict[str, Any]) -> _Look:
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    unknown = given - _HARMLESS - {"headrace", "scaling", "sliding_window", "softcap", "dropout"}
    if attention_mask is not None:
        unknown.add("attention_mask")
    if arguments.get("dropout"):
        unknown.add("dropout")
    if unknown:
        raise UnknownArgument(min(unknown))
    return _Look(arguments.get("scaling"), arguments.get("sliding_window"), arguments.get("softcap"))


def _layer(module: nn.Module) -> int:
    return int(module.layer_idx)  # type: ignore[arg-type]


def _attend_span(current: Pass, span: Span, query: Tensor, keys: Tensor, values: Tensor, look: _Look) -> Tensor:
    """One slice over its own keys.

    Args:
        query: [kv_heads, group, rows, head_size].
        keys: [kv_heads, slots, head_size], the whole pool; values alike.

    Returns:
        [rows, kv_heads, group, head_size].
    """
    seen = span.context if look.window is None else min(span.context, span.rows - 1 + look.window)
    end = span.start + span.context
    keys, values = keys[:, end - seen : end], values[:, end - seen : end]
    if span.rows == 1 and look.softcap is None:
        query = query.squeeze(2).unsqueeze(0)  # the group's heads as rows of one head: keys are read once
        return scaled_dot_product_attention(query, keys.unsqueeze(0), values.unsqueeze(0), scale=look.scale)
    mask = None if span.rows == 1 else current.mask(span, look.window, query)
    group = (query.shape[0], query.shape[1], seen, -1)
    keys, values = keys.unsqueeze(1).expand(group), values.unsqueeze(1).expand(group)
    if look.softcap is not None:
        return _softcapped(query, keys, values, mask, look).permute(2, 0, 1, 3)
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=look.scale).permute(2, 0, 1, 3)


def _softcapped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, look: _Look) -> Tensor:
    assert look.softcap is not None
    scale = query.shape[-1] ** -0.5 if look.scale is None else look.scale
    scores = torch.matmul(query, keys.transpose(2, 3)) * scale
    scores = torch.tanh(scores / look.softcap) * look.softcap
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), values)


def _mask(span: Span, window: int | None, like: Tensor) -> Tensor:
    seen = span.context if window is None else min(span.context, span.rows - 1 + window)
    rows = torch.arange(span.context - span.rows, span.context, device=like.device).unsqueeze(1)
    columns = torch.arange(span.context - seen, span.context, device=like.device).unsqueeze(0)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
