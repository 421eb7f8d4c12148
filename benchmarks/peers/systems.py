"""The table of systems: what each is called, which interpreter runs it, and with which weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from benchmarks.rig import ROOT

Weights: TypeAlias = Literal["folder", "f16", "bf16", "q4_1"]
PEERS = ROOT / ".venv-peers"
LLAMA_BINARIES = PEERS / "llama.cpp" / "bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row of the report."""

    label: str
    module: str  #: of ``benchmarks.peers``, run by the system's own interpreter
    environment: str  #: whose interpreter; ``--python`` replaces it by this name
    weights: Weights
    arguments: tuple[str, ...] = ()
    items: int | None = None  #: only the first so many; None: all


INTERPRETERS: Mapping[str, Path] = {
    "ours": Path(sys.executable),
    "openvino": PEERS / "openvino" / "bin" / "python",
    "vllm": ROOT / ".venv-vllm" / "bin" / "python",
}

SYSTEMS: Mapping[str, System] = {
    "engine": System(label="Headrace, bare engine", module="headrace_engine", environment="ours", weights="folder"),
    "engine-int8": System(
        label="Headrace, bare engine, int8",
        module="headrace_engine",
        environment="ours",
        weights="folder",
        arguments=("--dtype", "int8"),
    ),
    "openvino": System(
        label="OpenVINO GenAI, continuous batching",
        module="openvino_genai",
        environment="openvino",
        weights="f16",
    ),
    "openvino-u8": System(
        label="OpenVINO GenAI, 8-bit cache",
        module="openvino_genai",
        environment="openvino",
        weights="f16",
        arguments=("--cache", "u8"),
    ),
    "vllm": System(label="vLLM, CPU build", module="vllm_offline", environment="vllm", weights="folder"),
    "llama-q4": System(
        label="llama.cpp server, Q4_1",
        module="llama_server",
        environment="ours",
        weights="q4_1",
        arguments=("--binaries", "{llama}"),
    ),
    "llama-bf16": System(
        label="llama.cpp server, bfloat16",
        module="llama_server",
        environment="ours",
        weights="bf16",
        arguments=("--binaries", "{llama}"),
    ),
    "continuous": System(
        label="Transformers, continuous batching",
        module="transformers_own",
        environment="ours",
        weights="folder",
        arguments=("--way", "continuous"),
    ),
    "static": System(
        label="Transformers, static batches of 32",
        module="transformers_own",
        environment="ours",
        weights="folder",
        arguments=("--way", "static"),
    ),
    "single": System(
        label="Transformers, one at a time (first 8)",
        module="transformers_own",
        environment="ours",
        weights="folder",
        arguments=("--way", "single"),
        items=8,
    ),
}
