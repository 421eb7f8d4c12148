"""What vLLM is told of a job, parameter by parameter; runs in vLLM's environment (make test-vllm), loads no model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from core.answer import Answer, NoText
from core.card import FIRST_PARAMS, MEMORYLESS_PARAMS, OPTIONAL_PARAMS
from core.reader import Reader
from core.request import Request, SamplingParams
from core.sequence import Sequence
from tests.jobs_world import CARD

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        os.environ.get("HEADRACE_CONFORMANCE") != "vllm", reason="vLLM has an environment of its own: make test-vllm"
    ),
]

#: Passed on under their own names.
PASSED: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "logprobs": 2,
    "repetition_penalty": 1.3,
}
#: Ours: how long an answer is and where it ends, how many there are, and what their randomness comes from.
OURS: dict[str, Any] = {
    "max_tokens": 9,
    "n": 3,
    "seed": 7,
    "stop": ("x",),
    "ignore_eos": False,
    "stop_token_ids": (8,),
}
#: Passed on in vLLM's own shape.
SHAPED: dict[str, Any] = {"logit_bias": ((4, 2.5),)}
#: Refused by the card, by name.
LACKED = {
    *("presence_penalty", "frequency_penalty", "min_tokens", "bad_words", "prompt_logprobs", "structured_outputs"),
}


def told(emitted: int = 0, **params: Any) -> Any:
    """vLLM's parameters for a prompt of three tokens and so many that were published."""
    from core.vllm_engine import _params

    return _params(sequence_of(Request(token_ids=(4, 5, 6), params=SamplingParams(**params)), emitted))


def sequence_of(request: Request, emitted: int = 0) -> Sequence:
    return Sequence(
        job_id="a",
        request=request,
        tokens=[4, 5, 6, *[7] * emitted],
        prompt_tokens=3,
        most_tokens=3 + request.params.max_tokens,
        seed=request.params.seed or 0,
        answer=Answer(stream=NoText(), stop=(), end_ids=()),
    )


@pytest.mark.parametrize("salt", [None, "mine"])
def test_a_salt_keeps_its_prompt_apart_in_vllms_cache_too(salt: str | None) -> None:
    from core.vllm_engine import _prompt

    prompt = _prompt(sequence_of(Request(token_ids=(4, 5, 6), cache_salt=salt), emitted=2))

    assert (prompt["prompt_token_ids"], prompt.get("cache_salt")) == ([4, 5, 6, 7, 7], salt)


class FakeVllm:
    """Remembers how urgent it was told that each request is."""

    def __init__(self) -> None:
        self.priorities: dict[str, int] = {}

    def add_request(self, request_id: str, prompt: object, params: object, *, priority: int) -> None:
        self.priorities[request_id] = priority


def test_every_choice_of_a_job_is_told_its_priority() -> None:
    from core.vllm_engine import VllmEngine

    vllm, card = FakeVllm(), dataclasses.replace(CARD, abilities=FIRST_PARAMS)
    engine = VllmEngine(vllm, Reader(None, (), card), card, max_running=8)
    for job_id, priority in (("urgent", -100), ("plain", 0), ("low", 7)):
        engine.add(job_id, Request(token_ids=(4,), params=SamplingParams(n=2), priority=priority))

    assert vllm.priorities == {
        f"{job_id}/{index}": priority
        for job_id, priority in (("urgent", -100), ("plain", 0), ("low", 7))
        for index in (0, 1)
    }


@pytest.mark.parametrize(("args", "policy"), [({}, "priority"), ({"scheduling_policy": "fcfs"}, "fcfs")])
def test_vllm_schedules_by_priority_unless_the_operator_says_otherwise(
    tmp_path: Path, args: dict[str, Any], policy: str
) -> None:
    from core.vllm_engine import VllmConfig

    assert VllmConfig(args=args, kv_memory="64MiB").to_vllm(tmp_path).scheduling_policy == policy


def test_each_parameter_is_passed_under_its_name_or_is_ours() -> None:
    asked = {**PASSED, **OURS, **SHAPED}
    params = told(**asked)

    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == {*asked, *LACKED}, "a new one: map it or refuse it"
    assert {*OPTIONAL_PARAMS} - {*FIRST_PARAMS, *MEMORYLESS_PARAMS} == LACKED
    assert {name: getattr(params, name) for name in PASSED} == PASSED
    assert params.logit_bias == {4: 2.5}
    assert (params.max_tokens, params.n, params.stop, params.ignore_eos) == (9, 1, [], True)


def test_what_was_published_counts_towards_the_length() -> None:
    assert told(emitted=4, **OURS).max_tokens == 5


def test_a_drawn_answer_has_a_seed_of_its_own_at_each_position_and_a_greedy_one_none() -> None:
    seeds = [told(emitted=n, temperature=1.0, seed=seed).seed for n in range(3) for seed in (0, 7)]

    assert len(set(seeds)) == 6
    assert seeds == [told(emitted=n, temperature=1.0, seed=seed).seed for n in range(3) for seed in (0, 7)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert told(temperature=0.0, seed=7).seed is None


@pytest.mark.parametrize(
    ("args", "words"),
    [({"tensor_paralel_size": 2}, "has no argument 'tensor_paralel_size'"), ({"dtype": "half"}, "HEADRACE_DTYPE")],
)
def test_an_argument_that_this_vllm_has_not_is_refused_by_its_name(args: dict[str, Any], words: str) -> None:
    from core.vllm_engine import VllmConfig

    with pytest.raises(ValueError, match=f"^vllm_args: .*{words}"):
        VllmConfig(args=args)


def test_what_we_set_or_never_pass_on_are_names_that_this_vllm_has() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from core.vllm_args import NEVER, OURS

    assert {*OURS, *NEVER} <= {field.name for field in dataclasses.fields(EngineArgs)}
