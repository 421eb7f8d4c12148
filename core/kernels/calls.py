"""Calls a kernel by its name, and lets somebody listen. Knows no kernel."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from core.kernels.build import library


class Threads:
    """How many threads torch has when the call is made."""


THREADS: Final = Threads()
MOST_WORDS = 32  #: of one call, as ``replay.cpp`` has room for

Value: TypeAlias = Tensor | int | float | Threads | None
Listener: TypeAlias = Callable[[str, tuple[Value, ...]], None]
_listeners: list[Listener] = []


def call(name: str, *values: Value) -> None:
    """Call a kernel.

    Args:
        name: of its function.
        values: its words in their order, tensors by their address, None as 0.
    """
    words = [word_of(value) for value in values]
    function(name)((ctypes.c_int64 * len(words))(*words))
    for listener in _listeners:
        listener(name, values)


def word_of(value: Value) -> int:
    """What a value is as a number of eight bytes."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        word: int = struct.unpack("q", struct.pack("d", value))[0]
        return word
    if isinstance(value, Threads):
        return torch.get_num_threads()
    return value or 0


@contextmanager
def listened(listener: Listener) -> Iterator[None]:
    """Tell somebody of each call that is made meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@cache
def function(name: str) -> Any:
    """A kernel's function; there is a library, or nobody calls."""
    found = getattr(library(), name)
    found.argtypes, found.restype = (ctypes.c_void_p,), None
    return found
