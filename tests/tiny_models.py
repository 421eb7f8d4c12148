"""Tiny random decoders of the families we promise, saved as folders; and what Transformers itself says with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import torch
import transformers

VOCAB = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,  # large, so that the likeliest token is likely by far
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 128,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_GEMMA: dict[str, Any] = {**_COMMON, "sliding_window": 10, "query_pre_attn_scalar": 16}

_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

#: Family -> configuration class and its arguments. Windows are shorter than the tests' texts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2),
    "llama": ("LlamaConfig", _COMMON),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON),
    "gemma": ("GemmaConfig", _COMMON),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "layer_types": _LAYERS}),
    "mistral": ("MistralConfig", {**_COMMON, "sliding_window": 7}),
}


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A folder, and the same weights in Transformers' hands."""

    folder: Path
    model: Any

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """What ``generate`` says after ``prompt``, end of sequence ignored."""
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
            )
        ids: list[int] = output[0, len(prompt) :].tolist()
        return ids

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """float32 [tokens, vocab], by one plain pass."""
        with torch.inference_mode():
            result: torch.Tensor = self.model(torch.tensor([list(tokens)])).logits[0]
            return result


def make(family: str, folder: Path, seed: int = 0) -> TinyModel:
    """Save a tiny model of a family."""
    name, arguments = FAMILIES[family]
    return make_from(getattr(transformers, name)(**arguments), folder, seed)


def make_from(config: Any, folder: Path, seed: int = 0) -> TinyModel:
    """Save a model with random weights for any configuration."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # not all ones: a norm left out must show
    model.save_pretrained(folder)
    return TinyModel(folder, model)


def make_with_words(folder: Path) -> Path:
    """A tiny Llama of a shape that every engine takes, whose ids 3 … 63 are the words w3 … w63."""
    shape = {**_COMMON, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    make_from(transformers.LlamaConfig(**{**shape, "max_position_embeddings": 256}), folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCAB)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
