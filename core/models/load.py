"""A folder → a loaded, checked model with its tokenizer and its facts. Knows no job and no queue."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from core.attention import NAME, attend
from core.errors import ModelRefused
from core.memory import free_unused
from core.models.check import check_attention, fuse_checked, refuse_eight_bit_cache
from core.models.checksum import checksum
from core.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
_UNKNOWN_LENGTH = 4096  #: tokens, for a model that does not say how long its texts may be


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What an engine needs of a model."""

    model: Any  #: a Transformers decoder in evaluation mode, on its device, its attention ours
    tokenizer: Tokenizer | None
    dtype: torch.dtype  #: of everything that is not in eight bits
    eight_bits: bool  #: weights are int8, and what they are multiplied with
    device: torch.device
    weights: str  #: sha256 of weights, configuration and tokenizer
    end_ids: frozenset[int]  #: token ids that end an answer
    max_model_len: int  #: as the model says
    vocab_size: int  #: ids that may be put in
    eight_bit_cache: bool  #: keys and values are kept in eight bits
    bytes_per_token: int  #: of them, in all layers

    @property
    def computes_in(self) -> str:
        """As cards have it: two that differ in it say different things."""
        numbers = "int8" if self.eight_bits else str(self.dtype).removeprefix("torch.")
        return f"{numbers}-kv8" if self.eight_bit_cache else numbers


def load_model(
    folder: Path, name: str, dtype: str = "auto", kv_dtype: str = "auto", device: str = "auto", *, kernels: bool = True
) -> LoadedModel:
    """Load and check a model.

    Args:
        folder: with config.json, and safetensors or model.pth; a tokenizer or none.
        name: the one the operator gave, for messages.
        dtype: auto, float32, bfloat16 or int8; auto is bfloat16 where the device multiplies it faster.
        kv_dtype: auto, model or int8; auto is int8 with dtype int8 where that can be, else what the model computes in.
        device: auto, cpu, cuda or cuda:N.
        kernels: ours compute what they can.

    Raises:
        ModelRefused: it carries code, is no decoder we know, lacks weights, or our attention computes it wrongly.
    """
    config = _read_config(folder, name)
    target = choose_device(device)
    kind = choose_dtype(dtype, target)
    model = _load_weights(folder, config, name).eval()
    limit = int(getattr(config, "max_position_embeddings", None) or _UNKNOWN_LENGTH)
    AttentionInterface.register(NAME, attend)
    cache = check_attention(model, name, limit)
    _convert(model, kind)
    model.to(target)
    eight_bits = dtype == "int8"
    eight_bit_cache = kv_dtype == "int8" or (kv_dtype == "auto" and eight_bits)
    if eight_bit_cache and (reason := refuse_eight_bit_cache(model)):
        if kv_dtype == "int8":
            raise ModelRefused(name, reason)
        eight_bit_cache = False
    fused = kernels and fuse_checked(model, name, eight_bits=eight_bits, eight_bit_cache=eight_bit_cache)
    if eight_bits and not fused:
        raise ModelRefused(name, "int8 needs a processor with AVX512_BF16 and AVX512_VNNI, and a C++ compiler")
    tokenizer = _load_tokenizer(folder, name)
    free_unused(target)  # the weights came in float32
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        dtype=kind,
        eight_bits=eight_bits,
        device=target,
        weights=checksum(folder),
        end_ids=frozenset(_end_ids(model, tokenizer)),
        max_model_len=limit,
        vocab_size=model.get_input_embeddings().num_embeddings,
        eight_bit_cache=eight_bit_cache,
        bytes_per_token=cache.bytes_per_token(kind, eight_bits=eight_bit_cache),
    )


def choose_device(device: str) -> torch.device:
    """The device by its name; auto is a CUDA card where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device!r} is not there; torch sees {torch.cuda.device_count()} CUDA cards")
    return chosen


def choose_dtype(dtype: str, device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> torch.dtype:
    """The type by its name; auto is bfloat16 on a card or a processor with instructions for it, else float32."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    try:
        flags = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        flags = ""
    fast = any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def _read_config(folder: Path, name: str) -> Any:
    """The folder's configuration, once it is known to be a decoder without code of its own."""
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelRefused(name, f"{folder} has no config.json that can be read: {error}") from error
    if "auto_map" in written:
        raise ModelRefused(name, "its config.json has an auto_map: it wants to run code of its own, which we never do")
    decoder = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(written.get("model_type", ""))
    named = written.get("architectures") or [decoder]
    if decoder is None or named[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        what = named[0] or written.get("model_type")
        raise ModelRefused(name, f"{what!r} is no decoder that Transformers knows by name")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelRefused(name, "it is an encoder-decoder; only decoders are served")
    for kind in _rope_types(getattr(config, "rope_parameters", None)):
        if kind in ("dynamic", "longrope"):
            raise ModelRefused(name, f"its position encoding ({kind}) depends on the longest text of the batch")
    return config


def _rope_types(parameters: Any) -> Iterator[str]:
    """All ``rope_type`` values, of the whole model or of each kind of layer."""
    if isinstance(parameters, dict):
        if isinstance(kind := parameters.get("rope_type"), str):
            yield kind
        for value in parameters.values():
            yield from _rope_types(value)


def _load_weights(folder: Path, config: Any, name: str) -> Any:
    """The model in float32 on the CPU, every parameter read from the folder."""
    logging.disable_progress_bar()
    try:
        if not any(folder.glob("*.safetensors")):
            return _load_state_dict(folder, config, name)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelRefused(name, f"its weights cannot be loaded: {error}") from error
    _refuse_gaps(name, [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])])
    return model


def _load_state_dict(folder: Path, config: Any, name: str) -> Any:
    """``model.pth``: read as tensors only, never as a pickle that can run code."""
    path = folder / "model.pth"
    if not path.is_file():
        raise ModelRefused(name, f"{folder} has neither safetensors nor a model.pth")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = torch.load(path, map_location="cpu", weights_only=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    _refuse_gaps(name, [*(key for key in missing if key not in tied), *unexpected])
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _refuse_gaps(name: str, keys: Iterable[str]) -> None:
    """A parameter that is not in the folder would be random numbers."""
    if first := next(iter(keys), None):
        raise ModelRefused(name, f"its weights do not fit its config.json: {first!r} is missing or of another shape")


def _load_tokenizer(folder: Path, name: str) -> Tokenizer | None:
    try:
        return Tokenizer.load(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ModelRefused(name, f"its tokenizer cannot be loaded: {error}") from error


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as the angles of rotary positions stay float32, as Transformers loads them."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)


def _end_ids(model: Any, tokenizer: Tokenizer | None) -> Iterator[int]:
    for config in (model.generation_config, model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            yield from found if isinstance(found, list) else [found]
    if tokenizer is not None:
        yield from tokenizer.end_ids
