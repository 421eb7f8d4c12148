"""C++ → a library that fits this very processor. Compiled once a machine and kept; without a compiler there is none."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from core.models.source import cache_folder

_log = logging.getLogger("headrace.core")

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-pthread", "-fPIC", "-shared", "-Wno-psabi", "-Wno-ignored-attributes")
PATIENCE = 120.0  #: seconds for the compiler; it takes about two


@cache
def library() -> ctypes.CDLL | None:
    """Our kernels; None where there is no compiler."""
    if platform.system() != "Linux":
        return None
    compiler = shutil.which("g++") or shutil.which("clang++")
    path = cache_folder().with_name("kernels") / f"headrace-{_name()}.so"
    try:
        if not path.is_file():
            if compiler is None:
                raise FileNotFoundError("there is no C++ compiler")
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("the model runs on torch's own operators, which is slower: %s", error)
        return None


def has_products() -> bool:
    """Ours is the fastest way to multiply bfloat16 here: the processor has the instructions."""
    flags = {flag for line in processor() if line.startswith("flags") for flag in line.split()}
    return {"avx512_bf16", "avx512_vnni"} <= flags


@cache
def processor() -> tuple[str, ...]:
    """What tells this processor from others: its name, and the instructions it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return tuple(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _name() -> str:
    """Of this code on this processor: what was compiled elsewhere may use instructions that are not here."""
    code = [path.read_text(encoding="utf-8") for path in (*HEADERS, *SOURCES)]
    words = [*code, *FLAGS, *processor(), platform.machine()]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Into a name of its own first: several workers may start at once.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        made = Path(name) / path.name
        done = subprocess.run(
            [compiler, *FLAGS, *map(str, SOURCES), "-o", str(made)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode:
            raise OSError(f"{compiler} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        made.replace(path)
