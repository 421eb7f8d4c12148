"""What a model's layers have our kernels do in a pass, and what torch computes between. Repeats nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.attention import Pass
from core.kernels import rows
from core.kernels.calls import Value, listened

_EMPTY = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided)


@dataclass(slots=True, eq=False)
class Recording:
    """One pass through the layers. Keeps every tensor, so that no address means two things."""

    inputs: list[Tensor]
    shapes: list[tuple[int, int]] = field(default_factory=list)  #: of attention: heads and key-value heads
    calls: list[tuple[str, tuple[Value, ...]]] = field(default_factory=list)
    torchs: list[Tensor] = field(default_factory=list)  #: what torch itself has written
    out: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.inputs[0].shape[1]

    def note(self, name: str, values: tuple[Value, ...]) -> None:
        self.calls.append((name, values))


class _Torch(TorchDispatchMode):
    """Notes what torch computes between our kernels; a sum becomes one of them."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and not kwargs and _can_add(*args):
            return rows.add(*args)
        given = [each for each in args if isinstance(each, Tensor)]
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EMPTY:
            return out
        known = {storage(each) for each in given}
        found = [each for each in (out if isinstance(out, tuple | list) else [out]) if isinstance(each, Tensor)]
        if func._schema.is_mutable or any(storage(each) not in known for each in found):
            self._recording.torchs += [*found, *(given if func._schema.is_mutable else ())]
        return out


class Recorder:
    """Listens at the layers while the model is run."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.recordings: list[Recording] = []
        self.alike = True  #: each layer was called with what the one before it said, and else with the same
        self._last = len(layers) - 1
        self._stack = ExitStack()
        self._handles = [
            handle
            for number, layer in enumerate(layers)
            for handle in (
                layer.register_forward_pre_hook(self._before(number), with_kwargs=True),
                layer.register_forward_hook(self._after(number), with_kwargs=True),
            )
        ]
        self._hidden: Any = None
        self._others: dict[str, Any] = {}

    def close(self) -> None:
        self._stack.close()
        for handle in self._handles:
            handle.remove()

    def _before(self, number: int) -> Callable[..., None]:
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number:
                same = kwargs.keys() == self._others.keys()
                same = same and all(value is self._others[name] for name, value in kwargs.items())
                self.alike = self.alike and same and len(args) == 1 and args[0] is self._hidden
                return
            self._others = kwargs
            recording = Recording([args[0]])
            self.recordings.append(recording)
            self._stack.enter_context(listened(recording.note))
            self._stack.enter_context(_Torch(recording))

        return begin

    def _after(self, number: int) -> Callable[..., None]:
        def end(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self._hidden = out
            if number == self._last:
                self._stack.close()
                recording, current = self.recordings[-1], kwargs["headrace"]
                recording.shapes = list(current.shapes)
                recording.inputs += others(kwargs, recording.shapes)
                recording.out = out

        return end


def others(kwargs: dict[str, Any], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Tensors among a layer's arguments, and those of the pass."""
    found: list[Tensor] = []
    for value in kwargs.values():
        if isinstance(value, Pass):
            found += [value.layout(*shape) for shape in shapes]
            found += [pool for pools in value.cache.layers.values() for pool in pools]
        else:
            found += [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Tensor)]
    return found


def storage(tensor: Tensor) -> int:
    """Where the memory of a tensor begins."""
    return tensor.untyped_storage().data_ptr()


def _can_add(x: Any, y: Any) -> bool:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype is y.dtype is torch.bfloat16):
        return False
    return x.shape == y.shape and x.is_contiguous() and y.is_contiguous() and x.shape[-1] % rows.LANES == 0
