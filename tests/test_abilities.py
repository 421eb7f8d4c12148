"""What an engine declares: cards, old ones too; what is refused at submission; what vLLM is told."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from core.card import ALL_ABILITIES, FIRST_PARAMS, OPTIONAL_PARAMS, ModelCard
from core.errors import UnsupportedRequest
from core.instant import InstantConfig, InstantEngine
from core.request import Kind, Request, SamplingParams
from core.vllm_args import NEVER, OURS, check_names
from headrace.layers import load
from jobs.settings import SettingError, from_environ
from tests.api_world import front
from tests.processes import clean_environment
from tests.test_conformance import VALUES
from tests.worker_world import working
from worker.settings import WorkerSettings, read_vllm_args

ROOT = Path(__file__).parent.parent
CARD = InstantEngine().card
POOR = dataclasses.replace(CARD, kinds=("generate",), abilities=("seed",))


def test_a_card_from_before_there_were_abilities_still_reads_and_has_them_all() -> None:
    wire = CARD.to_wire()
    del wire["abilities"]

    assert ModelCard.from_wire(wire) == CARD
    assert ModelCard.from_wire(wire).abilities == ALL_ABILITIES


@pytest.mark.parametrize(
    ("name", "value"), [("n", 2), ("top_p", 0.5), ("top_k", 2), ("min_p", 0.1), ("logprobs", 0), ("seed", 4)]
)
def test_a_parameter_that_the_card_lacks_is_refused_by_name(name: str, value: Any) -> None:
    request = Request(prompt="a", params=SamplingParams(**{name: value}))
    CARD.refuse(request)
    with pytest.raises(UnsupportedRequest) as raised:
        dataclasses.replace(CARD, abilities=()).refuse(request)

    assert raised.value.param == f"params.{name}"


@pytest.mark.parametrize("name", sorted({*OPTIONAL_PARAMS} - {*FIRST_PARAMS}))
def test_a_parameter_that_is_newer_than_abilities_is_not_what_a_silent_card_can_do(name: str) -> None:
    request = Request(prompt="a", params=SamplingParams.from_wire({name: VALUES[name]}))
    wire = CARD.to_wire()
    del wire["abilities"]

    with pytest.raises(UnsupportedRequest, match=name):
        ModelCard.from_wire(wire).refuse(request)
    dataclasses.replace(CARD, abilities=OPTIONAL_PARAMS).refuse(request)


def test_a_kind_that_the_card_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedRequest, match="generate only"):
        POOR.refuse(Request(kind=Kind.PREDICT, token_ids=(1,)))


def poor(name: str) -> InstantEngine:
    """An engine that says it can do little."""
    engine = InstantEngine(InstantConfig(name=name))
    engine.card = dataclasses.replace(engine.card, kinds=POOR.kinds, abilities=POOR.abilities)
    return engine


def test_a_job_is_refused_at_submission_where_no_worker_of_its_model_has_what_it_asks_for(
    valkey: redis.Redis, valkey_url: str
) -> None:
    asked: dict[str, Any] = {"kind": "generate", "input": {"prompt": "a"}, "params": {"logprobs": 1}}
    with working(valkey_url, poor("small"), name="w1"), front(valkey_url) as api:
        refused = api.post("/v1/jobs", json=asked)
        kind = api.post("/v1/jobs", json={"kind": "predict", "input": {"token_ids": [1]}})
        taken = api.post("/v1/jobs", json={**asked, "params": {"seed": 1}})
        known = api.get("/v1/jobs").json()["data"]

    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "params.logprobs")
    assert refused.json()["error"]["code"] == "unsupported_request"
    assert (kind.status_code, kind.json()["error"]["param"]) == (422, "kind")
    assert taken.status_code == 202
    assert [job["id"] for job in known] == [taken.json()["id"]], "what is refused is not queued"


def test_a_job_is_taken_where_one_worker_of_several_has_what_it_asks_for(valkey: redis.Redis, valkey_url: str) -> None:
    asked = {"kind": "generate", "model": "same", "input": {"prompt": "a"}, "params": {"logprobs": 1}}
    able = InstantEngine(InstantConfig(name="same"))
    with working(valkey_url, poor("same"), name="w1"), working(valkey_url, able, name="w2"), front(valkey_url) as api:
        assert api.post("/v1/jobs", json=asked).status_code == 202


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("", {}),
        ("tensor_parallel_size=2 enforce_eager=true", {"tensor_parallel_size": 2, "enforce_eager": True}),
        ("distributed_executor_backend=ray swap=0.5", {"distributed_executor_backend": "ray", "swap": 0.5}),
        ('{"compilation_config": {"mode": 0}, "a": "b c"}', {"compilation_config": {"mode": 0}, "a": "b c"}),
    ],
)
def test_vllm_args_are_read_from_words_and_from_json(text: str, args: dict[str, Any]) -> None:
    assert read_vllm_args(text) == args


@pytest.mark.parametrize("text", ["oops", "=1", "a b=1", "{", "a-b=1", "a=" + "1" * 4096])
def test_vllm_args_that_are_neither_are_a_wrong_setting_of_that_name(text: str) -> None:
    with pytest.raises(SettingError, match="HEADRACE_VLLM_ARGS"):
        from_environ(WorkerSettings, {"HEADRACE_ENGINE": "vllm", "HEADRACE_VLLM_ARGS": text})


def test_vllm_args_of_the_configuration_file_reach_the_worker_unchanged(tmp_path: Path) -> None:
    args = '{"tensor_parallel_size": 8, "quantization": "fp8"}'
    config = tmp_path / "headrace.toml"
    config.write_text(f"engine = 'vllm'\nvllm_args = '{args}'\n")
    settings = from_environ(WorkerSettings, load({}, {}, config).to_environment())

    assert settings.engine == "vllm"
    assert read_vllm_args(settings.vllm_args) == {"tensor_parallel_size": 8, "quantization": "fp8"}


def test_vllm_args_with_another_engine_are_refused_and_not_ignored() -> None:
    with pytest.raises(SettingError, match="HEADRACE_VLLM_ARGS: is for engine vllm, and this is torch"):
        from_environ(WorkerSettings, {"HEADRACE_VLLM_ARGS": "a=1"})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tensor_paralel_size", "vLLM 1.2 has no argument 'tensor_paralel_size'"),
        *((name, f"{name} is set by HEADRACE_{setting}") for name, setting in OURS.items()),
        *((name, f"{name} is not passed on") for name in NEVER),
    ],
)
def test_an_argument_that_vllm_has_not_or_that_we_set_is_refused_by_its_name(name: str, why: str) -> None:
    known = {"tensor_parallel_size", *OURS, *NEVER}
    check_names(["tensor_parallel_size"], known, "1.2")
    with pytest.raises(ValueError, match=f"^vllm_args: {why}"):
        check_names(["tensor_parallel_size", name], known, "1.2")


def test_a_worker_told_to_use_vllm_where_there_is_none_says_so_and_exits_2(valkey_url: str) -> None:
    program = """
import os, sys
sys.modules["vllm"] = None
sys.argv[1:] = ["--engine-process", str(os.getppid()), str(os.pipe()[1])]
import worker.__main__
sys.exit(worker.__main__.main())
"""
    environ = clean_environment(HEADRACE_ENGINE="vllm", HEADRACE_REDIS_URL=valkey_url, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 2, done.stderr
    assert "HEADRACE_ENGINE: is vllm, and vLLM cannot be imported here" in done.stderr
