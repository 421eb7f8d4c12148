"""How much memory the engine holds: at its peak beside its weights and cache, and over many jobs one after the other.

    python -m benchmarks.footprint --jobs 10000

The bound is that of a process with the libraries loaded and no model, plus 1.2 times weights and configured cache.
Every block of the cache is written before the peak is read.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rig import describe_machine
from core.request import Request, SamplingParams
from core.threads import keep_calm

if TYPE_CHECKING:
    from core.engine import Engine

MIB = 1 << 20
BYTES = {"bfloat16": 2, "float32": 4}


def main() -> None:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub name")
    parser.add_argument("--dtype", default="bfloat16", choices=BYTES)
    parser.add_argument("--kv-memory", default="1GiB")
    parser.add_argument("--jobs", type=int, default=10_000)
    arguments = parser.parse_args()
    keep_calm(arguments.dtype, os.environ)
    from core.engine import Engine, EngineConfig
    from core.memory import parse_size
    from core.models.source import resolve

    libraries = read("VmRSS")
    engine = Engine.load(EngineConfig(model=arguments.model, dtype=arguments.dtype, kv_memory=arguments.kv_memory))
    loaded = read("VmHWM")
    weights = numbers_in(resolve(arguments.model)) * BYTES[arguments.dtype] / MIB
    cache = parse_size(arguments.kv_memory) / MIB
    fill(engine, tokens=int(cache * MIB) // bytes_per_token(engine))
    print(f"libraries {libraries:.0f} MiB, weights {weights:.0f}, cache {cache:.0f}, ", end="")
    print(f"so the bound is {libraries + 1.2 * (weights + cache):.0f}")
    print(f"peak {read('VmHWM'):.0f} MiB, {loaded:.0f} of it while loading; resident now {read('VmRSS'):.0f}")
    sizes = []
    for number in range(arguments.jobs):
        if number % max(1, arguments.jobs // 10) == 0:
            sizes.append(f"{read('VmRSS'):.0f}")
        prompt = (number % 1000 + 100, *range(200, 208))
        engine.generate([Request(token_ids=prompt, params=SamplingParams(max_tokens=2))])
    print(f"resident over {arguments.jobs} jobs, one after the other, MiB: {', '.join(sizes)}, {read('VmRSS'):.0f}")
    print(f"{arguments.dtype}, {describe_machine()}, {time.strftime('%Y-%m-%d')}, `python -m benchmarks.footprint`")


def read(field: str) -> float:
    """VmRSS, what is resident now, or VmHWM, the most that ever was; MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def numbers_in(folder: Path) -> int:
    """Parameters of the safetensors in a folder."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def bytes_per_token(engine: Engine) -> int:
    """Of keys and values, in all layers."""
    return engine._loaded.bytes_per_token


def fill(engine: Engine, tokens: int) -> None:
    """Let prompts that share nothing pass until each block was written."""
    length = 1024
    prompts = [tuple((7 * n + 13 * at) % 40_000 + 100 for at in range(length)) for n in range(tokens // length + 1)]
    engine.generate([Request(token_ids=prompt, params=SamplingParams(max_tokens=1)) for prompt in prompts])


if __name__ == "__main__":
    main()
