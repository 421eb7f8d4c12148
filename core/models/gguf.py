"""A GGUF file → a folder that Transformers loads quickly. Run once a model; the result is kept."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(gguf: Path, folder: Path) -> None:
    """Write float32 safetensors, configuration, tokenizer and chat template of ``gguf`` into ``folder``."""
    print(f"converting {gguf.name} to float32 (once)", file=sys.stderr, flush=True)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with quiet:  # Transformers draws bars, which a log file shows as one endless line
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
