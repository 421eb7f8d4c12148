"""Which of vLLM's arguments an operator may give. Standard library only: refusing one needs no vLLM."""

from __future__ import annotations

from collections.abc import Collection, Iterable

#: What the engine sets itself, from our settings or because the protocol needs it so.
OURS = {
    "model": "MODEL",
    "revision": "REVISION",
    "dtype": "DTYPE",
    "hf_token": "HF_TOKEN",
    "max_model_len": "MAX_MODEL_LEN",
    "max_num_seqs": "MAX_RUNNING",
    "max_num_batched_tokens": "STEP_TOKENS",
    "kv_cache_memory_bytes": "KV_MEMORY",
}
#: What would break a promise: code from a repository, text of its own, tokens held back, several engines in one.
NEVER = (
    "trust_remote_code",
    "tokenizer",
    "skip_tokenizer_init",
    "stream_interval",
    "logprobs_mode",
    "data_parallel_size",
)


def check_names(names: Iterable[str], known: Collection[str], version: str) -> None:
    """Refuse what is not to be passed on.

    Args:
        names: what the operator gave.
        known: what this version of vLLM takes.

    Raises:
        ValueError: naming the first that is ours, that no promise survives, or that vLLM has not.
    """
    for name in names:
        if name in OURS:
            raise ValueError(f"vllm_args: {name} is set by HEADRACE_{OURS[name]}")
        if name in NEVER:
            raise ValueError(f"vllm_args: {name} is not passed on: the engine's promises depend on it")
        if name not in known:
            raise ValueError(f"vllm_args: vLLM {version} has no argument {name!r}")
