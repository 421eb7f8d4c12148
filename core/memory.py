"""How much memory there is, and what it looks like when there is none. Knows sizes in words; reserves nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch

SHARE = 0.25  #: of a host's memory, for ``auto``: several workers may share it
CARD_SHARE = 0.8  #: of what is free on a card once the weights are there
USUAL_TOKENS = 2048  #: a sequence's length that ``auto`` reckons with, where the model takes longer ones

#: What allocators say that have no error class of their own: the processor's, cuBLAS, and drivers.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of ``2GiB``, ``512MB`` or ``1000000``.

    Raises:
        ValueError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f'must be "auto" or a size such as "2GiB", not {text!r}')
    return int(float(match[1]) * _UNITS[match[2]])


def available_bytes(device: torch.device) -> int:
    """Memory that ``auto`` may take: a share of the host's (or of its container's), or of what the card has free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CARD_SHARE)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a bound
        host = min(host, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return int(host * SHARE)


def usual_tokens(max_running: int, max_model_len: int) -> int:
    """Cache slots for ``max_running`` sequences of a usual length, and for at least one as long as may be."""
    return max(max_running * min(max_model_len, USUAL_TOKENS), max_model_len)


def cache_tokens(memory: str, bytes_per_token: int, wanted: int, device: torch.device) -> int:
    """Slots that ``memory`` holds; of ``auto`` as many as are wanted, where there is so much."""
    if memory != "auto":
        return parse_size(memory) // bytes_per_token
    return min(wanted, available_bytes(device) // bytes_per_token)


def is_out_of_memory(error: Exception) -> bool:
    """An allocation failed: smaller ones may not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def free_unused(device: torch.device) -> None:
    """Give back what allocators keep for later; in pieces of the wrong size it is of no use to the next try."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's
        trim(0)
