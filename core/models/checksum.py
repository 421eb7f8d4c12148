"""What a model is, in one number: sha256 over its weights, configuration and tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from core.models.source import cache_folder, sha256_of

#: Endings and names of the files that decide what a model says.
COUNTED = (".safetensors", ".pth", ".json", ".jinja", ".model", ".txt")

_KEPT = ".headrace-sha256.json"  #: beside the files, in our own cache only


def checksum(folder: Path) -> str:
    """sha256 over the names and contents of a model folder's files, hexadecimal.

    Reading gigabytes at every start would be slow: for a folder in our cache the files' own sums are kept beside them,
    and believed while size and time of change are the same.
    """
    kept = _read_kept(folder)
    sums = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in COUNTED and path.name != _KEPT):
        state = path.stat()
        mark = [state.st_size, state.st_mtime_ns]
        known = kept.get(path.name)
        sums[path.name] = known if known and known[:2] == mark else [*mark, sha256_of(path)]
    if sums != kept and folder.resolve().is_relative_to(cache_folder().resolve()):
        _write_kept(folder, sums)
    whole = hashlib.sha256()
    for name, (_, _, digest) in sums.items():
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _read_kept(folder: Path) -> dict[str, list[object]]:
    try:
        kept = json.loads((folder / _KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write_kept(folder: Path, sums: dict[str, list[object]]) -> None:
    """Best effort: a cache that cannot be written (a read-only image) costs time, not correctness."""
    unfinished = folder / f"{_KEPT}.new"
    try:
        unfinished.write_text(json.dumps(sums), encoding="utf-8")
        unfinished.replace(folder / _KEPT)
    except OSError:
        return
