"""Our kernel computes attention, whatever the shape; it does so alike for any slicing; and nobody needs a compiler."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from core.attention import KVCache, Pass, attend
from core.batch import Batch, build_batch
from core.engine import Engine, EngineConfig
from core.errors import ModelRefused
from core.kernels import build, paged
from core.models.load import load_model
from core.request import Request, SamplingParams
from core.scheduler import Slice, Step
from tests.test_core_scheduler import sequence_of
from tests.tiny_models import make, make_from


class Layer(nn.Module):
    layer_idx = 0


SHAPES = [(2, 2, 16), (6, 2, 64), (9, 3, 64), (14, 2, 32), (8, 1, 128), (4, 4, 256)]
LOOKS: list[dict[str, Any]] = [{}, {"sliding_window": 7}, {"sliding_window": 33}, {"softcap": 3.0, "scaling": 0.3}]


class Spoiled(KVCache):
    """Eight bits, in memory that somebody else has used: no number, whatever it is read as."""

    def pools(self, layer: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        new = layer not in self.layers
        for pool in (pools := super().pools(layer, keys)):
            if new:
                pool.fill_(255)
        return pools


def attend_to(
    lengths: list[int],
    cuts: list[list[int]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    eight_bits: bool = False,
    **look: Any,
) -> Tensor:
    """Let texts pass in slices; the attention of every token of each: [tokens, heads, head_size]."""
    heads, kv_heads, head_size = shape
    numbers = torch.Generator().manual_seed(sum(lengths))
    cache = Spoiled(64, eight_bits=True) if eight_bits else KVCache(64)
    free = iter(torch.randperm(64, generator=numbers).tolist())
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


eight_bits_here = pytest.mark.skipif(
    not hasattr(build.library(), "attend_float_int8"), reason="there is no attention in eight bits for this processor"
)


@eight_bits_here
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_keys_and_values_in_eight_bits_attention_is_off_by_their_rounding(
    shape: tuple[int, int, int], dtype: torch.dtype, look: dict[str, Any]
) -> None:
    lengths, cuts = [300, 50, 1, 83], [[290, 300], [20, 21, 50], [1], [16, 83]]
    ours = attend_to(lengths, cuts, shape, dtype, eight_bits=True, **look)
    expected = attend_to(lengths, cuts, shape, torch.float32, **look)

    difference = (ours.float() - expected).abs()
    assert difference.max() < 0.12
    assert (
        difference.square().mean().sqrt() < 0.012 * expected.square().mean().sqrt() + (dtype is torch.bfloat16) * 0.004
    )
    assert difference.max() > 1e-4


@eight_bits_here
def test_eight_bits_hold_a_constant_exactly_and_nothing_as_nothing() -> None:
    cache = Spoiled(8, eight_bits=True)
    sequence = sequence_of("text", 20, 1)
    sequence.blocks = [5, 2]
    batch = build_batch(Step((Slice(sequence, 0, 20),)), torch.device("cpu"), pad=False)
    query, zeros = torch.ones(1, 4, 20, 32), torch.zeros(1, 2, 20, 32)
    values = torch.full((1, 2, 20, 32), -2.54)

    out = attend(Layer(), query, zeros, values, headrace=Pass(batch, cache))[0]

    assert torch.allclose(out, torch.tensor(-2.54), rtol=1e-4)
    assert not attend(Layer(), query, zeros, zeros, headrace=Pass(batch, cache))[0].any()


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("eight_bits", [False, pytest.param(True, marks=eight_bits_here)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_and_neighbours_change_not_one_bit(dtype: torch.dtype, eight_bits: bool, look: dict[str, Any]) -> None:
    whole = attend_to([83], [[83]], (6, 2, 64), dtype, eight_bits=eight_bits, **look)
    for cut in ([1, 2, 3, 83], [15, 16, 17, 48, 83], list(range(1, 84))):
        assert torch.equal(attend_to([83], [cut], (6, 2, 64), dtype, eight_bits=eight_bits, **look), whole), cut


@pytest.mark.parametrize(("found", "head_size"), [(None, 16), (object(), 16), ("ours", 8)])
def test_keys_in_eight_bits_are_refused_where_nothing_reads_them(
    found: object, head_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_size, max_position_embeddings=128,
    )  # fmt: skip
    make_from(config, tmp_path)
    if found != "ours":
        monkeypatch.setattr(paged, "library", lambda: found)
    with pytest.raises(ModelRefused, match="eight bits need AVX512_VNNI, a C\\+\\+ compiler"):
        load_model(tmp_path, "tiny", dtype="float32", kv_dtype="int8")
    assert not load_model(tmp_path, "tiny", dtype="float32").eight_bit_cache


@eight_bits_here
def test_a_cache_in_eight_bits_that_lies_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama", tmp_path)
    assert load_model(tmp_path, "tiny", dtype="float32", kv_dtype="int8").computes_in == "float32-kv8"
    monkeypatch.setattr(KVCache, "pools", lying(KVCache.pools))
    with pytest.raises(ModelRefused, match="in eight bits its logits are others"):
        load_model(tmp_path, "tiny", dtype="float32", kv_dtype="int8")


def lying(own: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks of eight bits that lose what they hold."""

    def pools(cache: KVCache, layer: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = own(cache, layer, keys)
        if cache.eight_bits:
            found[1].zero_()
        return found

    return pools


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


def test_an_unknown_kind_of_cache_is_named_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="kv_dtype: must be one of auto, model, int8, not 'fp8'"):
        EngineConfig(kv_dtype="fp8")
