"""Our kernels compute what the model's own modules compute, each row by itself; what they cannot stays as it is."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from core import fused
from core.engine import Engine, EngineConfig
from core.kernels import products, rows
from core.kernels.build import has_products
from core.kernels.products import pack, product
from core.models.load import load_model
from core.request import Request, SamplingParams
from core.threads import keep_calm
from tests.tiny_models import FAMILIES, make, make_from

pytestmark = pytest.mark.skipif(not has_products(), reason="there are no products of ours for this processor")

SHAPES = [(32, 4), (96, 64), (33, 68), (1, 8), (576, 1536), (1000, 96)]  # outputs, inputs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("count", [0, 1, 2, 11, 12, 13, 24, 25, 37, 200])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_product_is_that_of_torch(outputs: int, inputs: int, count: int) -> None:
    weight, bias, x = random(outputs, inputs), random(outputs, seed=1), random(count, inputs, seed=2)
    expected = linear(x.float(), weight.float(), bias.float())
    close = 1e-5 * inputs + 1e-4
    assert torch.allclose(product(x, pack([weight], [bias]), torch.float32), expected, atol=close)
    assert torch.allclose(product(x, pack([weight], [bias])).float(), expected, atol=close, rtol=2**-8)
    several = pack([weight[: outputs // 2], weight[outputs // 2 :]], [None, bias[outputs // 2 :]])
    expected[:, : outputs // 2] -= bias[: outputs // 2].float()
    assert torch.allclose(product(x, several, torch.float32), expected, atol=close)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_product_in_eight_bits_is_off_by_the_rounding_of_both_sides_at_most(outputs: int, inputs: int) -> None:
    weight, bias, x = random(outputs, inputs), random(outputs, seed=1), random(30, inputs, seed=2)
    expected = linear(x.float(), weight.float(), bias.float())
    found = product(x, pack([weight], [bias], eight_bits=True), torch.float32)
    halves = [each.float().abs().amax(1) / 127 / 2 for each in (x, weight)]  # what rounding moves a number by
    sizes = [each.float().abs().sum(1) for each in (x, weight)]
    most = halves[0][:, None] * sizes[1] + sizes[0][:, None] * halves[1] + inputs * halves[0][:, None] * halves[1]
    assert ((found - expected).abs() <= most + 1e-3).all()
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean() + 0.02


@pytest.mark.parametrize("eight_bits", [False, True])
@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.integers(0, 63), min_size=1, max_size=60), strided=st.booleans())
def test_a_row_of_a_product_does_not_know_its_neighbours(eight_bits: bool, numbers: list[int], strided: bool) -> None:
    packed = pack([random(96, 64)], [None], eight_bits=eight_bits)
    x = random(64, 128)[:, :64] if strided else random(64, 64)
    alone = torch.cat([product(x[n : n + 1], packed, torch.float32) for n in range(64)])
    assert torch.equal(product(x[numbers], packed, torch.float32), alone[numbers])
    assert torch.equal(product(x, packed, torch.float32), alone)


@pytest.mark.parametrize("inputs", [64, 68, 128, 132, 256, 576])
def test_rows_in_eight_bits_are_rounded_by_groups_so_that_an_outlier_spoils_its_own_alone(inputs: int) -> None:
    weight, x = random(40, inputs, seed=1), random(5, inputs)
    x[:, 3] = 1000
    rounded = [rounded_in_eight_bits(each) for each in x.float().split(products.GROUP, 1)]
    worth = weight.float().abs().amax(1, keepdim=True) / 127
    expected = torch.cat(rounded, 1) @ ((weight.float() / worth).round() * worth).T
    found = product(x, pack([weight], [None], eight_bits=True), torch.float32)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def rounded_in_eight_bits(rows: Tensor) -> Tensor:
    largest = rows.abs().amax(1, keepdim=True)
    return (rows * (127 / largest)).round() * (largest / 127)


def test_embeddings_are_read_from_the_weights_of_the_product() -> None:
    weight, numbers = random(70, 64), torch.tensor([[0, 69, 31, 32, 5]])
    assert torch.equal(products.rows_of(pack([weight], [None]), numbers), weight[numbers])


@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 7, 576), (300, 64)])
def test_norm_and_gate_are_those_of_their_papers(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape) * 3, random(shape[-1], seed=1)
    wide = x.float()
    norm = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.float()
    assert torch.allclose(rows.rms_norm(x, weight, 1e-5).float(), norm, rtol=2**-6, atol=1e-3)
    pairs = torch.cat([x * 10, random(*shape, seed=2)], -1)
    gated = silu(pairs[..., : shape[-1]].float()) * pairs[..., shape[-1] :].float()
    assert torch.allclose(rows.silu_times(pairs).float(), gated, rtol=2**-6, atol=1e-3)


def test_a_norm_of_a_rows_parts_is_that_of_each_by_itself() -> None:
    whole, weight = random(1, 5, 7 * 32), random(32, seed=1)
    parts = whole[..., 64:160].view(1, 5, 3, 32)
    assert not parts.is_contiguous()
    expected = rows.rms_norm(parts.contiguous().view(15, 32), weight, 1e-5)
    assert torch.equal(rows.rms_norm(parts, weight, 1e-5), expected.view(1, 5, 3, 32))


def test_a_sum_is_torchs_to_the_last_bit() -> None:
    x, y = random(1, 300, 64), random(1, 300, 64, seed=1)
    assert torch.equal(rows.add(x, y), x + y)


@settings(max_examples=60, deadline=None)
@given(
    rows_=st.integers(0, 5),
    groups=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 7, 10**6]),
    seed=st.integers(0, 99),
)
def test_the_largest_is_torchs_and_of_equal_ones_the_first(rows_: int, groups: int, levels: int, seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randint(levels, (rows_, 16 * groups), generator=numbers).float()
    x[x < levels // 3] = -torch.inf
    expected = [row.index(max(row)) for row in x.tolist()]
    assert rows.argmax(x).tolist() == expected
    assert rows.argmax(x.T.contiguous().T).tolist() == expected


@pytest.mark.parametrize(("heads", "count", "size"), [(3, 1, 32), (2, 9, 64), (4, 100, 128)])
def test_a_rotation_is_that_of_transformers_llama(heads: int, count: int, size: int) -> None:
    x = random(1, count, heads, size).transpose(1, 2)
    cos, sin = random(1, count, size, seed=1), random(1, count, size, seed=2)
    own = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    expected = own(x.float(), x.float(), cos.float(), sin.float())[0]
    assert torch.allclose(rows.rotate(x, cos, sin).float(), expected, rtol=2**-7, atol=2**-6)


def wide(family: str) -> Any:
    """A configuration whose heads are wide enough for every kernel."""
    name, arguments = FAMILIES[family]
    return getattr(transformers, name)(**{**arguments, "head_dim": 32, "initializer_range": 0.1})


def logits(model: Any) -> Tensor:
    from core.models import check

    texts = [check._text(model, 40), check._text(model, 20)]
    with torch.inference_mode():
        return torch.cat(check._logits(model, texts, check._cache_for(texts)))


#: What must not be left as it was, besides products: "norm", "rotation", "gate".
FUSED = {
    "llama": {"Norm", "Gated", "Part", "Product", "Table", "forward"},
    "mistral": {"Norm", "Gated", "Part", "Product", "Table", "forward"},
    "qwen2": {"Norm", "Gated", "Part", "Product", "Table", "forward"},
    "qwen3": {"Norm", "Gated", "Part", "Product", "Table", "forward"},
    "gemma": {"Part", "Product", "forward"},
    "gemma2": {"Part", "Product", "forward"},
    "gemma3": {"Part", "Product", "forward"},
    "gpt2": {"Product"},
}


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("family", sorted(FUSED))
def test_a_fused_model_says_what_it_said_before(family: str, eight_bits: bool, tmp_path: Path) -> None:
    config = wide(family)
    config.tie_word_embeddings = True
    make_from(config, tmp_path)
    plain = load_model(tmp_path, name=family, dtype="bfloat16", kernels=False).model
    ours = load_model(tmp_path, name=family, dtype="bfloat16", kernels=False).model
    done = fused.fuse(ours, eight_bits=eight_bits)
    kinds = {name if name == "forward" else type(getattr(parent, name)).__name__ for parent, name, _ in done.replaced}
    assert kinds >= FUSED[family]
    assert not any(type(module) is nn.Linear for module in ours.modules())
    expected = logits(plain)
    assert (logits(ours) - expected).abs().max() < (0.15 if eight_bits else 0.04) * expected.abs().max()
    done.undo()
    assert torch.equal(logits(ours), expected)


def test_a_kernel_that_lies_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    make("llama", tmp_path)
    expected = logits(load_model(tmp_path, name="tiny", dtype="bfloat16", kernels=False).model)
    monkeypatch.setattr(fused, "product", lambda x, packed, *dtype: -product(x, packed, *dtype))
    model = load_model(tmp_path, name="tiny", dtype="bfloat16").model
    assert "slower" in caplog.text
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("found", [None, object()])
def test_without_kernels_or_with_a_compiler_too_old_for_them_nothing_is_replaced(
    found: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("llama", tmp_path)
    monkeypatch.setattr(products, "library", lambda: found)
    model = load_model(tmp_path, name="tiny", dtype="bfloat16").model
    assert any(type(module) is nn.Linear for module in model.modules())


REQUESTS = [
    Request(token_ids=tuple(3 + (i * n) % 60 for i in range(n)), params=SamplingParams(max_tokens=14, **how))
    for n, how in [
        *[(n, dict[str, Any](logprobs=0)) for n in (1, 5, 18, 33, 50)],
        (20, {"temperature": 0.9, "seed": 7, "logprobs": 2}),
        (33, {"temperature": 1.1, "seed": 3, "top_p": 0.8, "n": 2, "logprobs": 0}),
    ]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    make_from(wide("llama"), folder)
    return folder


def engine_of(folder: Path, dtype: str, **settings: Any) -> Engine:
    return Engine.load(EngineConfig(model=str(folder), dtype=dtype, **{"kv_memory": "2MiB", **settings}))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[Any]]:
    engines = {dtype: engine_of(folder, dtype, prefix_cache=False) for dtype in ("bfloat16", "int8")}
    return {dtype: [engine.generate([request])[0].choices for request in REQUESTS] for dtype, engine in engines.items()}


@settings(max_examples=25, deadline=None)
@given(
    mix=st.lists(st.integers(0, len(REQUESTS) - 1), min_size=2, max_size=12),
    step_tokens=st.sampled_from([1, 3, 16, 64, 256]),
    memory=st.sampled_from(["52KiB", "80KiB", "2MiB"]),
    prefix_cache=st.booleans(),
)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_in_bfloat16_and_in_eight_bits_a_job_says_the_same_to_the_last_bit_in_any_company(
    folder: Path, alone: Any, dtype: str, mix: list[int], step_tokens: int, memory: str, prefix_cache: bool
) -> None:
    engine = engine_of(
        folder, dtype, step_tokens=step_tokens, kv_memory=memory, prefix_cache=prefix_cache, max_running=6
    )
    results = engine.generate([dataclasses.replace(REQUESTS[number]) for number in mix])
    assert [result.choices for result in results] == [alone[dtype][number] for number in mix]


@pytest.mark.parametrize(
    ("dtype", "environ", "expected"),
    [
        ("auto", {}, "0"),
        ("int8", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("bfloat16", {"OMP_WAIT_POLICY": "active"}, None),
        ("float32", {}, None),
    ],
)
def test_torchs_threads_sleep_where_ours_work_unless_somebody_says_otherwise(
    dtype: str, environ: dict[str, str], expected: str | None
) -> None:
    keep_calm(dtype, environ)
    assert environ.get("GOMP_SPINCOUNT") == expected


def test_work_is_done_once_whoever_does_it_and_however_many_call() -> None:
    packed, x = pack([random(96, 64)], [None]), random(50, 64)
    expected = product(x, packed, torch.float32)

    def many(_: int) -> bool:
        return all(torch.equal(product(x, packed, torch.float32), expected) for _ in range(300))

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as callers:
            assert all(callers.map(many, range(4)))
    finally:
        torch.set_num_threads(threads)
