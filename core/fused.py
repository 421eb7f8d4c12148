"""A model's modules → ones that compute the same with our kernels. The model's own code calls them as it did before.

Products with the same input become one over packed weights; normalisation, rotary positions and the gate of SwiGLU pass
over their rows once. What is not recognised, or does not say what it replaces, stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from core.kernels import products, rows
from core.kernels.products import Packed, pack, product

_TOLERANCE = 2.0**-5  #: of the largest number: what we replace rounds to eight bits more often than we do
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ROTATE = "apply_rotary_pos_emb"


class Product(nn.Module):
    """A linear layer over packed weights."""

    def __init__(self, packed: Packed, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.packed = packed
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.packed, self._dtype)


class Shared:
    """One product for several layers with the same input: the first one asked computes for all."""

    def __init__(self, packed: Packed, sizes: list[int]) -> None:
        self._packed = packed
        self._sizes = sizes
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, number: int, x: Tensor) -> Tensor:
        """A layer's share of the product with ``x``; each is given once."""
        if x is not self._input or number not in self._parts:
            self._input = x
            self._parts = dict(enumerate(product(x, self._packed).split(self._sizes, -1)))
        found = self._parts.pop(number)
        if not self._parts:
            self._input = None
        return found


class Part(nn.Module):
    """One of the layers that share a product."""

    def __init__(self, shared: Shared, number: int) -> None:
        super().__init__()
        self._shared = shared
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.part(self._number, x)


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rows.rms_norm(x, self.weight, self._eps)


class Gated(nn.Module):
    """SwiGLU: two products in one, the gate, a third."""

    def __init__(self, pairs: Packed, down: Packed) -> None:
        super().__init__()
        self._pairs = pairs
        self._down = down

    def forward(self, x: Tensor) -> Tensor:
        return product(rows.silu_times(product(x, self._pairs)), self._down)


class Table(nn.Module):
    """Embeddings that are read from the packed weights of the product they are shared with."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.num_embeddings = packed.outputs
        self._packed = packed

    def forward(self, token_ids: Tensor) -> Tensor:
        return products.rows_of(self._packed, token_ids)


class Fused:
    """What was replaced in a model, and how to undo it."""

    def __init__(self) -> None:
        self.replaced: list[tuple[nn.Module, str, Any]] = []  #: whose attribute was what

    def __len__(self) -> int:
        return len(self.replaced)

    def put(self, parent: nn.Module, name: str, new: Any) -> None:
        """Replace a child or the forward of a module."""
        self.replaced.append((parent, name, None if name == "forward" else getattr(parent, name)))
        setattr(parent, name, new)

    def undo(self) -> None:
        """Put everything back."""
        for parent, name, old in reversed(self.replaced):
            if name == "forward":
                delattr(parent, name)
            else:
                setattr(parent, name, old)
        self.replaced.clear()


@torch.inference_mode()
def fuse(model: Any, *, eight_bits: bool = False) -> Fused:
    """Replace what our kernels compute faster; nothing where there are none for this processor and this dtype.

    Args:
        model: a Transformers decoder, its attention ours.
        eight_bits: round weights to int8, except the vocabulary's.
    """
    fused = Fused()
    if model.device.type != "cpu" or model.dtype is not torch.bfloat16 or not products.available():
        return fused
    _fuse_vocabulary(model, fused)
    rotations: dict[Any, Callable[..., Any] | None] = {}
    for parent in list(model.modules()):
        _fuse_rotation(parent, fused, rotations)
        for name, child in list(parent.named_children()):
            new = _gated(child, eight_bits) or _norm(child)
            if new is not None:
                fused.put(parent, name, new)
    for parent in list(model.modules()):
        for names in _TOGETHER:
            _fuse_layers(parent, [name for name in names if _is_linear(getattr(parent, name, None))], fused, eight_bits)
        for name, child in list(parent.named_children()):
            if _is_linear(child):
                fused.put(parent, name, Product(pack([child.weight], [child.bias], eight_bits=eight_bits)))
    return fused


def _fuse_vocabulary(model: Any, fused: Fused) -> None:
    """The last product gives float32, and embeddings that are its weights are read from where it has them."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not _is_linear(head):
        return
    packed = pack([head.weight], [head.bias])
    tied = type(embeddings) is nn.Embedding and embeddings.weight is head.weight
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is head:
                fused.put(parent, name, Product(packed, torch.float32))
            elif child is embeddings and tied:
                fused.put(parent, name, Table(packed))


def _fuse_layers(parent: nn.Module, names: list[str], fused: Fused, eight_bits: bool) -> None:
    layers = [cast("nn.Linear", getattr(parent, name)) for name in names]
    if len(layers) < 2 or len({layer.in_features for layer in layers}) > 1:
        return
    packed = pack([layer.weight for layer in layers], [layer.bias for layer in layers], eight_bits=eight_bits)
    shared = Shared(packed, [layer.out_features for layer in layers])
    for number, name in enumerate(names):
        fused.put(parent, name, Part(shared, number))


def _gated(module: nn.Module, eight_bits: bool) -> nn.Module | None:
    children = dict(module.named_children())
    if children.keys() != _GATED or "silu" not in type(children["act_fn"]).__name__.lower():
        return None
    layers = [children[name] for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(map(_is_linear, layers)):
        return None
    gate, up, down = cast("list[nn.Linear]", layers)
    if gate.out_features % rows.LANES:
        return None
    pairs = pack([gate.weight, up.weight], [gate.bias, up.bias], eight_bits=eight_bits)
    new = Gated(pairs, pack([down.weight], [down.bias], eight_bits=eight_bits))
    return new if eight_bits or _alike(module, new, (1, 3, gate.in_features)) else None


def _norm(module: nn.Module) -> nn.Module | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or eps is None or weight is None or weight.dim() != 1:
        return None
    new = Norm(weight, eps)
    return new if len(weight) % rows.LANES == 0 and _alike(module, new, (1, 3, len(weight))) else None


def _fuse_rotation(module: nn.Module, fused: Fused, known: dict[Any, Callable[..., Any] | None]) -> None:
    """Run the module's own forward with our rotation in the place of the function it calls by name."""
    forward = inspect.unwrap(type(module).forward)
    own = getattr(forward, "__globals__", {}).get(_ROTATE)
    if own is None or _ROTATE not in forward.__code__.co_names:
        return
    if own not in known:
        known[own] = _rotation(own)
    if (new := known[own]) is not None:
        names = {**forward.__globals__, _ROTATE: new}
        ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        ours.__kwdefaults__ = forward.__kwdefaults__
        fused.put(module, "forward", MethodType(ours, module))


def _rotation(own: Callable[..., Any]) -> Callable[..., Any] | None:
    """The same function with our kernel, where that says the same."""

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        size = q.shape[-1]
        if others or named or len(q) != 1 or cos.dim() != 3 or cos.shape[-1] != size or size % (2 * rows.LANES):
            return cast("tuple[Tensor, Tensor]", own(q, k, cos, sin, *others, **named))
        return rows.rotate(q, cos, sin), rows.rotate(k, cos, sin)

    numbers = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, heads, 3, 64, generator=numbers).bfloat16() for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 64, generator=numbers).bfloat16() for _ in range(2))
    try:
        expected = own(q, k, cos, sin)
        return rotated if all(map(_near, expected, rotated(q, k, cos, sin))) else None
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return None  # it takes something else than the function of this name that we know


def _alike(old: nn.Module, new: nn.Module, shape: tuple[int, ...]) -> bool:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return _near(old(x), new(x))


def _near(expected: Tensor, found: Tensor) -> bool:
    difference = (expected.float() - found.float()).abs().max()
    return bool(difference <= _TOLERANCE * expected.float().abs().max())


def _is_linear(module: Any) -> bool:
    return type(module) is nn.Linear and module.in_features % 4 == 0
