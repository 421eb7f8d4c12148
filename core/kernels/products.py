"""Activations times packed weights: tensors in, pointers out. Knows the layout that ``products.cpp`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from core.kernels.build import has_products, library
from core.kernels.calls import THREADS, call

WIDTH = 32  #: outputs of a panel
GROUP = 128  #: inputs that are rounded to eight bits together: one that stands out spoils no more than these
_WHOLE = 127  #: what the largest weight of an output is in eight bits


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The weights of one product, or of several with the same input, one after the other."""

    panels: Tensor  #: bfloat16 [panels, inputs / 2, WIDTH, 2] or int8 [panels, inputs / 4, WIDTH, 4]
    outputs: int
    inputs: int
    bias: Tensor | None = None  #: float32, of whole panels like all that follow
    scales: Tensor | None = None  #: float32, of int8 weights: what 1 is worth for each output


def available() -> bool:
    """Our products can be used, and are the best here."""
    found = library()
    return has_products() and found is not None and hasattr(found, "product_bfloat16_bfloat16")  # old compilers lack it


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, eight_bits: bool = False) -> Packed:
    """Lay weights out for the kernel.

    Args:
        weights: bfloat16 [outputs, inputs] each, of the same inputs, a multiple of 4.
        biases: one each, or none.
        eight_bits: round each output's weights to int8, its largest at 127.
    """
    outputs, inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
    more = -outputs % WIDTH
    bias = None
    if any(each is not None for each in biases):
        parts = [
            torch.zeros(len(weight)) if each is None else each.detach().float()
            for weight, each in zip(weights, biases, strict=True)
        ]
        bias = pad(torch.cat(parts), (0, more))
    whole = pad(torch.cat([weight.detach() for weight in weights]), (0, 0, 0, more))
    if not eight_bits:
        return Packed(_panels(whole, 2), outputs, inputs, bias)
    scales = whole.float().abs().amax(1).clamp_min(1e-30) / _WHOLE
    rounded = (whole.float() / scales.unsqueeze(1)).round_().to(torch.int8)
    return Packed(_panels(rounded, 4), outputs, inputs, bias, scales)


def product(x: Tensor, packed: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Multiply; with int8 weights each row of ``x`` is rounded to eight bits first, by groups of ``GROUP`` inputs.

    Args:
        x: bfloat16 [..., inputs].
        dtype: bfloat16 or float32.

    Returns:
        [..., outputs], of which a row depends on nothing but its own row of ``x``, to the last bit.
    """
    rows = x.reshape(-1, packed.inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(*x.shape[:-1], packed.outputs, dtype=dtype)
    name = "float" if dtype is torch.float32 else "bfloat16"
    given = (rows, rows.stride(0), packed.panels)
    sizes = (rows.shape[0], packed.outputs, packed.inputs, THREADS)
    if packed.scales is None:
        call(f"product_bfloat16_{name}", *given, packed.bias, out, *sizes)
    else:
        groups = (rows.shape[0], -(-packed.inputs // GROUP))
        room = (torch.empty(rows.shape, dtype=torch.int8), torch.empty(groups), torch.empty(groups, dtype=torch.int32))
        call(f"product_int8_{name}", *given, packed.scales, packed.bias, out, *room, *sizes)
    return out


def rows_of(packed: Packed, numbers: Tensor) -> Tensor:
    """The weights of single outputs: bfloat16 [..., inputs]; for a table of embeddings that is a product, too."""
    found = packed.panels[numbers // WIDTH, :, numbers % WIDTH].flatten(-2)
    if packed.scales is not None:
        found = found.float() * packed.scales[numbers].unsqueeze(-1)
    return found.to(torch.bfloat16)


def _panels(weights: Tensor, deep: int) -> Tensor:
    outputs, inputs = weights.shape
    return weights.view(outputs // WIDTH, WIDTH, inputs // deep, deep).transpose(1, 2).contiguous()
