"""A model's layers as one call: what they had our kernels do, written down at load and done again without Python.

What CUDA graphs are on a card (Gray, "Getting started with CUDA Graphs", NVIDIA 2019), for a processor and for any
number of rows: a pass is recorded three times, with different numbers of rows, and each number and each address in it
has to be a line through them. Nothing is known of the model but that its layers are called alike, one after the other;
where they do anything but call our kernels and add, they are called as they were.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.fused import Fused
from core.kernels.calls import MOST_WORDS, Threads, Value, function, word_of
from core.recording import Recorder, Recording, others, storage

PASSES = 3  #: two make a line, and the third has to be on it
_NOTHING, _THREADS, _INPUTS = 0, 1, 2  #: what addresses are counted from: none, and then inputs and buffers
_LINE_BYTES = 64  #: of the processor's cache


class Unrepeatable(Exception):
    """The layers do something that cannot be done again by calling our kernels."""


@dataclass(frozen=True, slots=True)
class Line:
    """``fixed + each * rows``"""

    fixed: int
    each: int

    @classmethod
    def through(cls, rows: Sequence[int], values: Sequence[int]) -> Line:
        """Raises Unrepeatable where there is none."""
        each = (values[1] - values[0]) // (rows[1] - rows[0])
        line = cls(values[0] - each * rows[0], each)
        if any(line.at(x) != y for x, y in zip(rows, values, strict=True)):
            raise Unrepeatable(f"{values} are no line over {rows}")
        return line

    def at(self, rows: int) -> int:
        return self.fixed + self.each * rows


_ZERO = Line(0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Calls of our kernels, for any number of rows."""

    calls: Tensor  #: int64 [calls, 2]: the function, how many words
    lines: Tensor  #: int64 [words, 3]: counted from what, and the line
    inputs: list[torch.dtype]
    shapes: list[tuple[int, int]]
    buffers: list[Line]  #: bytes of each
    out: int  #: in which of them the outcome is

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """Compute; ``inputs`` are those of a Recording, and what is returned is like the first of them."""
        hidden = inputs[0]
        count, at, starts = hidden.shape[1], 0, []
        for line in self.buffers:
            starts.append(at)
            at += -(-line.at(count) // _LINE_BYTES) * _LINE_BYTES
        room = torch.empty(at, dtype=torch.uint8)
        first = room.data_ptr()
        bases = [
            0,
            torch.get_num_threads(),
            *(each.data_ptr() for each in inputs),
            *(first + start for start in starts),
        ]
        given = (ctypes.c_int64 * len(bases))(*bases)
        words = (self.calls.data_ptr(), len(self.calls), self.lines.data_ptr(), ctypes.addressof(given), count)
        function("replay")((ctypes.c_int64 * len(words))(*words))
        start = starts[self.out]
        return room[start : start + hidden.nbytes].view(hidden.dtype).view(hidden.shape)


class Chain(nn.Module):
    """Layers that are called as one."""

    def __init__(self, layers: nn.ModuleList, program: Program) -> None:
        super().__init__()
        self.layers = layers
        self._program = program

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        inputs = [hidden, *others(kwargs, self._program.shapes)]
        if [each.dtype for each in inputs] == self._program.inputs and all(each.is_contiguous() for each in inputs):
            return self._program.run(inputs)
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)  # the first pass with a new cache, which makes its pools
        return hidden


def chain(model: Any, fused: Fused, run: Callable[[], object]) -> str:
    """Let a model's layers be called as one.

    Args:
        model: a decoder whose modules are ours where they can be.
        fused: takes note of what is replaced.
        run: passes through the model, at least ``PASSES`` of them with different numbers of rows, all with one cache.

    Returns:
        Why they are not; empty when they are.
    """
    parent, name, layers = max(_lists(model), key=lambda found: len(found[2]), default=(model, "", nn.ModuleList()))
    if not len(layers):
        return "it has no list of layers"
    recorder = Recorder(layers)
    try:
        run()
        if not recorder.alike:
            raise Unrepeatable("its layers are not called alike")
        program = write(_different(recorder.recordings))
    except Unrepeatable as reason:
        return str(reason)
    finally:
        recorder.close()
    fused.put(parent, name, nn.ModuleList([Chain(layers, program)]))
    return ""


def write(recordings: Sequence[Recording]) -> Program:
    """The program that does what was recorded.

    Raises:
        Unrepeatable: there is none.
    """
    if len(recordings) < PASSES:
        raise Unrepeatable(f"its layers were called {len(recordings)} times")
    names = [[(name, len(values)) for name, values in each.calls] for each in recordings]
    if any(each != names[0] for each in names) or len({len(each.inputs) for each in recordings}) > 1:
        raise Unrepeatable("it does not call the same kernels for any number of rows")
    places = _Places(recordings)
    words: list[tuple[int, Line]] = []
    for number, (_, count) in enumerate(names[0]):
        if count > MOST_WORDS:
            raise Unrepeatable(f"a call has {count} words")
        words += [places.find(number, [each.calls[number][1][word] for each in recordings]) for word in range(count)]
    out, line = places.find(len(names[0]), [each.out for each in recordings])
    slots, buffers = places.share()
    inputs = [each.dtype for each in recordings[0].inputs]
    first = _INPUTS + len(inputs)
    alike = all(each.out is not None and each.out.shape == each.inputs[0].shape for each in recordings)
    if out < first or line != _ZERO or not alike:
        raise Unrepeatable("what the last layer says is not like what the first one takes")
    bases = [*range(first), *(first + slot for slot in slots)]
    return Program(
        calls=torch.tensor([[_address(name), count] for name, count in names[0]]),
        lines=torch.tensor([[bases[base], line.fixed, line.each] for base, line in words]),
        inputs=inputs,
        shapes=recordings[0].shapes,
        buffers=buffers,
        out=slots[out - first],
    )


class _Places:
    """Where the tensors of several recordings lie, in terms of their inputs and of buffers of ours."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._counts = [each.rows for each in recordings]
        self._inputs = [{storage(each): n for n, each in enumerate(one.inputs)} for one in recordings]
        self._torchs = [{storage(each) for each in one.torchs} for one in recordings]
        self._first = _INPUTS + len(recordings[0].inputs)
        self._buffers: list[dict[int, int]] = [{} for _ in recordings]  #: storage -> number
        self._sizes: list[Line] = []
        self._used: list[tuple[int, int]] = []  #: the first and the last call of each buffer

    def find(self, number: int, values: Sequence[Value]) -> tuple[int, Line]:
        """What the same word of each recording is counted from, and its distance from there, in a call."""
        if all(isinstance(value, Threads) for value in values):
            return _THREADS, _ZERO
        tensors = [value for value in values if isinstance(value, Tensor)]
        if not tensors:
            return _NOTHING, self._line(map(word_of, values))
        if len(tensors) < len(values):
            raise Unrepeatable("a tensor is not always there")
        storages = [storage(value) for value in tensors]
        inputs = {own.get(storage) for own, storage in zip(self._inputs, storages, strict=True)}
        if len(inputs) > 1:
            raise Unrepeatable("an input is not always the same one")
        if (found := inputs.pop()) is not None:
            return _INPUTS + found, self._line(map(_offset, tensors))
        if len(set(storages)) == 1:  # of the model
            return _NOTHING, self._line(value.data_ptr() for value in tensors)
        return self._first + self._buffer(number, tensors), self._line(map(_offset, tensors))

    def _buffer(self, number: int, tensors: Sequence[Tensor]) -> int:
        """The buffer that a call's tensor is in."""
        storages = [storage(value) for value in tensors]
        if any(storage in theirs for storage, theirs in zip(storages, self._torchs, strict=True)):
            raise Unrepeatable("torch computes what our kernels read")
        numbers = {own.setdefault(storage, len(own)) for own, storage in zip(self._buffers, storages, strict=True)}
        if len(numbers) > 1:
            raise Unrepeatable("its buffers are not always the same ones")
        buffer = numbers.pop()
        if buffer == len(self._sizes):
            self._sizes.append(self._line(value.untyped_storage().nbytes() for value in tensors))
            self._used.append((number, number))
        self._used[buffer] = (self._used[buffer][0], number)
        return buffer

    def _line(self, values: Iterable[int]) -> Line:
        return Line.through(self._counts, list(values))

    def share(self) -> tuple[list[int], list[Line]]:
        """One buffer for several whose times do not overlap: which each becomes, and their sizes."""
        until: list[int] = []
        sizes: list[Line] = []
        slots = []
        for (begin, end), size in zip(self._used, self._sizes, strict=True):  # in the order of their beginnings
            slot = next((n for n, free in enumerate(until) if free < begin), len(until))
            if slot == len(until):
                until.append(end)
                sizes.append(size)
            until[slot] = end
            sizes[slot] = Line(max(sizes[slot].fixed, size.fixed), max(sizes[slot].each, size.each))
            slots.append(slot)
        return slots, sizes


def _lists(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList):
                yield parent, name, child


def _different(recordings: Sequence[Recording]) -> list[Recording]:
    """One for each number of rows, of those that were made with all pools there."""
    whole = max((len(each.inputs) for each in recordings), default=0)
    return list({each.rows: each for each in recordings if len(each.inputs) == whole}.values())


def _offset(tensor: Tensor) -> int:
    return tensor.data_ptr() - storage(tensor)


def _address(name: str) -> int:
    address = ctypes.cast(function(name), ctypes.c_void_p).value
    assert address is not None
    return address
