"""Prompt log-probabilities and structured output through the whole house: HTTP, Redis, a worker, the torch engine."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import redis

from core.engine import Engine, EngineConfig
from tests.api_world import front
from tests.test_core_structured import save_bytes
from tests.tiny_models import FAMILIES, make_from
from tests.worker_world import working


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny model whose 256 first tokens are bytes."""
    import transformers

    folder: Path = tmp_path_factory.mktemp("bytes")
    name, arguments = FAMILIES["llama"]
    make_from(getattr(transformers, name)(**{**arguments, "vocab_size": 260, "eos_token_id": 256}), folder)
    save_bytes(folder)
    engine = Engine.load(EngineConfig(model=str(folder), dtype="float32", kv_memory="1MiB", threads=1))
    engine.card = dataclasses.replace(engine.card, name="tiny")
    return engine


def test_jobs_have_what_they_asked_for_and_a_bad_grammar_fails_its_own(
    engine: Engine, valkey: redis.Redis, valkey_url: str
) -> None:
    def ask(**params: object) -> dict[str, object]:
        return {"kind": "generate", "input": {"prompt": "abc"}, "params": {"max_tokens": 9, "seed": 1, **params}}

    with working(valkey_url, engine, name="w1"), front(valkey_url) as api:
        asked = {
            "scored": ask(prompt_logprobs=2, logprobs=1, frequency_penalty=1.0),
            "held": ask(structured_outputs={"regex": "x{2}[0-9]{3}"}, temperature=1.0),
            "bad": ask(structured_outputs={"grammar": "start: nowhere"}),
        }
        for name, body in asked.items():
            assert api.put(f"/v1/jobs/{name}", json=body).status_code == 202
        jobs = {name: api.get(f"/v1/jobs/{name}?wait=30").json() for name in asked}
        refused = api.post("/v1/jobs", json=ask(structured_outputs={"regex": "a", "choice": ["b"]}))
        unknown = api.post("/v1/jobs", json=ask(structured_outputs={"regx": "a"}))

    scored = jobs["scored"]["result"]["prompt_logprobs"]
    assert scored[0] is None
    assert [len(each["top"]) for each in scored[1:]] == [2, 2]
    assert all(each["logprob"] < 0 for each in scored[1:])
    assert re.fullmatch("x{2}[0-9]{3}", jobs["held"]["result"]["choices"][0]["text"])
    assert "prompt_logprobs" not in jobs["held"]["result"]
    assert (jobs["bad"]["status"], jobs["bad"]["error"]["code"]) == ("failed", "grammar_refused")
    assert jobs["bad"]["error"]["param"] == "params.structured_outputs"
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "params.structured_outputs")
    assert unknown.json()["error"]["message"].endswith("did you mean 'regex'?")
