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

SOURCE = Path(__file__).with_name("attention.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi", "-Wno-ignored-attributes")
PATIENCE = 120.0  #: seconds for the compiler; it takes about one


@cache
def library() -> ctypes.CDLL | None:
    """Our kernels; None where there is no compiler."""
    if platform.system() != "Linux":
        return None
    compiler = shutil.which("g++") or shutil.which("clang++")
    path = cache_folder().with_name("kernels") / f"attention-{_name()}.so"
    try:
        if not path.is_file():
            if compiler is None:
                raise FileNotFoundError("there is no C++ compiler")
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("attention runs on torch's own operators, which is slower: %s", error)
        return None


def _name() -> str:
    """Of this code on this processor: what was compiled elsewhere may use instructions that are not here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    about = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    words = [SOURCE.read_text(encoding="utf-8"), *FLAGS, *about, platform.machine()]
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
            [compiler, *FLAGS, str(SOURCE), "-o", str(made)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode:
            raise OSError(f"{compiler} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        made.replace(path)
