"""Layers called as one say to the last bit what they say one by one, for any number of rows; or they are left alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from core import replay
from core.fused import Fused, fuse
from core.kernels.build import has_products
from core.models import check
from core.models.load import load_model
from core.replay import Chain, Line, Unrepeatable
from tests.test_core_fused import wide
from tests.tiny_models import make_from

pytestmark = pytest.mark.skipif(not has_products(), reason="there are no products of ours for this processor")

CHAINED = ("llama", "mistral", "qwen2", "qwen3")


def load(family: str, folder: Path, **settings: Any) -> Any:
    make_from(wide(family), folder)
    return load_model(folder, name=family, dtype="bfloat16", **settings).model


def chains(model: nn.Module) -> list[Chain]:
    return [module for module in model.modules() if isinstance(module, Chain)]


def logits_of(model: Any, lengths: tuple[int, ...], *, eight_bits: bool = False) -> list[Tensor]:
    """Of texts that pass together; twice with one cache, so that a chain is one the second time."""
    texts = [check._text(model, length) for length in lengths]
    cache = check._cache_for(texts, eight_bits=eight_bits)
    with torch.inference_mode():
        return [torch.cat(check._logits(model, texts, cache)) for _ in range(2)]


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    runs: list[int] = []
    own = replay.Program.run

    def run(program: replay.Program, inputs: Any) -> Tensor:
        runs.append(inputs[0].shape[1])
        return own(program, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(replay.Program, "run", run)
        yield runs


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("family", CHAINED)
def test_a_chain_says_to_the_last_bit_what_its_layers_say_one_by_one(
    family: str, eight_bits: bool, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_from(wide(family), tmp_path)
    model = load_model(tmp_path, name=family, dtype="int8" if eight_bits else "bfloat16").model
    [chain] = chains(model)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for lengths in ((40, 20), (9, 9), (100, 120, 90, 11)):
            with counted(monkeypatch) as runs:
                one_by_one, as_one = logits_of(model, lengths, eight_bits=eight_bits)
            assert len(runs) == 9  # all but the first pass, which makes the pools
            assert torch.equal(one_by_one, as_one)
            with monkeypatch.context() as patch:
                patch.setattr(chain, "_program", dataclasses.replace(chain._program, inputs=[]))
                assert torch.equal(logits_of(model, lengths, eight_bits=eight_bits)[1], as_one)
            with counted(monkeypatch) as runs:
                logits_of(model, lengths, eight_bits=not eight_bits)
            assert not runs  # a cache of another kind is not what was recorded
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "gpt2"])
def test_layers_that_torch_computes_or_that_are_called_unlike_are_left_alone(family: str, tmp_path: Path) -> None:
    assert not chains(load(family, tmp_path))


def test_without_our_kernels_nothing_is_chained(tmp_path: Path) -> None:
    assert not chains(load("llama", tmp_path, kernels=False))


class Between(nn.Module):
    """A layer, and something else of torch."""

    def __init__(self, layer: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.act = layer, act

    def forward(self, hidden: Tensor, **kwargs: Any) -> Any:
        return self.act(self.layer(hidden, **kwargs))


def grow(hidden: Tensor) -> Tensor:
    return hidden.mul_(1.5)


ACTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a product": (lambda hidden: hidden * 1.5, "torch computes"),
    "a product in place": (grow, "torch computes"),
    "a branch by rows": (lambda hidden: hidden if hidden.shape[1] > 20 else hidden + hidden, "the same kernels"),
    "a sum of another kind": (lambda hidden: hidden + hidden[:, :1], "torch computes"),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_layer_that_does_more_is_found_out_and_the_model_says_the_same(act: str, tmp_path: Path) -> None:
    model = load("llama", tmp_path, kernels=False)
    parent = next(parent for parent in model.modules() if hasattr(parent, "layers"))
    function, reason = ACTS[act]
    parent.layers[1] = Between(parent.layers[1], function)
    fused = fuse(model)
    [_, expected] = logits_of(model, (40, 20))
    texts = [check._text(model, length) for length in (40, 20)]
    cache = check._cache_for(texts)
    with torch.inference_mode():
        assert reason in replay.chain(model, fused, lambda: check._logits(model, texts, cache))
    assert not chains(model)
    assert torch.equal(logits_of(model, (40, 20))[1], expected)


def test_too_few_passes_and_a_model_without_layers_are_told(tmp_path: Path) -> None:
    assert "0 times" in replay.chain(load("llama", tmp_path), Fused(), lambda: None)
    assert "no list of layers" in replay.chain(nn.Linear(2, 2), Fused(), lambda: None)


def test_a_run_that_fails_leaves_no_listener_behind(tmp_path: Path) -> None:
    model = load("llama", tmp_path, kernels=False)
    with pytest.raises(KeyError):
        replay.chain(model, Fused(), lambda: model(nonsense=1, input_ids=torch.tensor([[3]])))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_chain_can_be_undone(tmp_path: Path) -> None:
    model = load("llama", tmp_path, kernels=False)
    [_, expected] = logits_of(model, (40, 20))
    fused = fuse(model)
    texts = [check._text(model, length) for length in (40, 20)]
    cache = check._cache_for(texts)
    with torch.inference_mode():
        assert not replay.chain(model, fused, lambda: check._logits(model, texts, cache))
    assert chains(model)
    fused.undo()
    assert not chains(model)
    assert torch.equal(logits_of(model, (40, 20))[1], expected)


@given(
    fixed=st.integers(-(2**40), 2**40),
    each=st.integers(0, 2**20),
    rows=st.lists(st.integers(1, 4096), min_size=3, max_size=3, unique=True),
    off=st.integers(-2, 2),
)
def test_a_line_goes_through_what_is_on_one_and_nothing_else(fixed: int, each: int, rows: list[int], off: int) -> None:
    values = [fixed + each * count for count in rows]
    assert Line.through(rows, values) == Line(fixed, each)
    if off:
        with pytest.raises(Unrepeatable):
            Line.through(rows, [*values[:2], values[2] + off])
