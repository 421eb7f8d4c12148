"""Our kernel computes attention, whatever the shape; it does so alike for any slicing; and nobody needs a compiler."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.attention import KVCache, Pass, attend
from core.batch import Batch, build_batch
from core.engine import Engine, EngineConfig
from core.kernels import build, paged
from core.request import Request, SamplingParams
from core.scheduler import Slice, Step
from tests.test_core_scheduler import sequence_of
from tests.tiny_models import make


class Layer(nn.Module):
    layer_idx = 0


SHAPES = [(2, 2, 16), (6, 2, 64), (9, 3, 64), (14, 2, 32), (8, 1, 128), (4, 4, 256)]
LOOKS: list[dict[str, Any]] = [{}, {"sliding_window": 7}, {"sliding_window": 33}, {"softcap": 3.0, "scaling": 0.3}]


def attend_to(
    lengths: list[int], cuts: list[list[int]], shape: tuple[int, int, int], dtype: torch.dtype, **look: Any
) -> Tensor:
    """Let texts pass in slices; the attention of every token of each: [tokens, heads, head_size]."""
    heads, kv_heads, head_size = shape
    numbers = torch.Generator().manual_seed(sum(lengths))
    cache, free = KVCache(64), iter(torch.randperm(64, generator=numbers).tolist())
    texts, given = [], []
    for length in lengths:
        sequence = sequence_of("text", length, 1)
        sequence.blocks = [next(free) for _ in range(-(-length // 16))]
        texts.append(sequence)
        given.append(
            [
                torch.randn(1, many, length, head_size, generator=numbers).to(dtype)
                for many in (heads, kv_heads, kv_heads)
            ]
        )
    rows: list[list[Tensor]] = [[] for _ in texts]
    for round_ in itertools.zip_longest(*(itertools.pairwise([0, *cut]) for cut in cuts)):
        pieces = [(number, Slice(texts[number], *edges)) for number, edges in enumerate(round_) if edges]
        batch = build_batch(Step(tuple(piece for _, piece in pieces)), torch.device("cpu"), pad=True)
        inputs = [
            padded(torch.cat([given[n][i][:, :, p.begin : p.end] for n, p in pieces], 2), batch) for i in range(3)
        ]
        out = attend(Layer(), *inputs, headrace=Pass(batch, cache), **look)[0][0]
        for (number, _), span in zip(pieces, batch.spans, strict=True):
            rows[number].append(out[span.first : span.last])
    return torch.cat([torch.cat(each) for each in rows])


def padded(tensor: Tensor, batch: Batch) -> Tensor:
    return nn.functional.pad(tensor, (0, 0, 0, batch.input_ids.shape[1] - tensor.shape[2]))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(paged, "kernel", lambda *_: None)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_says_what_torch_says(
    shape: tuple[int, int, int], dtype: torch.dtype, look: dict[str, Any], plain: Callable[[], None]
) -> None:
    assert build.library() is not None, "this machine has a compiler"
    lengths, cuts = [50, 1, 83], [[20, 21, 50], [1], [16, 83]]
    ours = attend_to(lengths, cuts, shape, dtype, **look)
    plain()
    expected = attend_to(lengths, cuts, shape, dtype, **look)

    assert (ours - expected).abs().max() < (2e-6 if dtype is torch.float32 else 0.03)
    assert ours.abs().max() > 0.5


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_and_neighbours_change_not_one_bit(dtype: torch.dtype, look: dict[str, Any]) -> None:
    whole = attend_to([83], [[83]], (6, 2, 64), dtype, **look)
    for cut in ([1, 2, 3, 83], [15, 16, 17, 48, 83], list(range(1, 84))):
        assert torch.equal(attend_to([83], [cut], (6, 2, 64), dtype, **look), whole), cut


def test_without_a_compiler_torch_computes_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("llama", tmp_path).folder
    requests = [
        Request(token_ids=tuple(range(3, 3 + n)), params=SamplingParams(max_tokens=12, n=2)) for n in (1, 20, 40)
    ]

    def said() -> list[Any]:
        engine = Engine.load(EngineConfig(model=str(folder), dtype="float32", kv_memory="1MiB", threads=1))
        return [[choice.token_ids for choice in result.choices] for result in engine.generate(requests)]

    compiled = said()
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "empty"))
    build.library.cache_clear()
    try:
        assert build.library() is None
        assert said() == compiled
    finally:
        build.library.cache_clear()


@pytest.mark.parametrize("refusal", [OSError("no room"), subprocess.TimeoutExpired("g++", 1)])
def test_a_compiler_that_fails_is_said_and_survived(
    refusal: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise refusal

    monkeypatch.setattr(build, "_compile", fail)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    build.library.cache_clear()
    try:
        assert build.library() is None
        assert "slower" in caplog.text
    finally:
        build.library.cache_clear()
