"""Answers of a given form: always of it, wherever they are taken up; and a grammar that bursts fails its own job."""

from __future__ import annotations

import ctypes
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core import grammar
from core.engine import Engine, EngineConfig
from core.errors import GrammarRefused, InvalidField, UnsupportedRequest
from core.grammar import Constraint, Grammars
from core.models.load import LoadedModel, load_model
from core.request import Choice, Emitted, Event, FailedEvent, FinishedEvent, Request, SamplingParams, TokenEvent
from core.structured import Structured
from tests.tiny_models import FAMILIES, make_from, make_with_words

END = 256
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA},
    "regex": {"regex": "(ab|cd){2,4}[0-9]"},
    "choice": {"choice": ["yes", "no", 'ÿes "quoted"\n']},
    "grammar": {"grammar": 'start: "(" start ")" | /x+/'},
}


def holds(form: str, text: str) -> bool:
    """By other means than the engine's."""
    if form == "json":
        value = json.loads(text)
        return set(value) == {"name", "age"} and len(value["name"]) <= 4 and 0 <= value["age"] <= 99
    if form == "regex":
        return re.fullmatch(FORMS["regex"]["regex"], text) is not None
    if form == "choice":
        return text in FORMS["choice"]["choice"]
    inner = text.strip("()")
    return text == "(" * text.count("(") + inner + ")" * text.count("(") and set(inner) == {"x"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny model whose 256 first tokens are bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    name, arguments = FAMILIES["llama"]
    config = getattr(transformers, name)(**{**arguments, "vocab_size": 260, "eos_token_id": END})
    make_from(config, folder)
    save_bytes(folder)
    return load_model(folder, name="tiny", dtype="float32", device="cpu")


def save_bytes(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{letter: number for number, letter in enumerate(alphabet)}, "<end>": END}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(folder)


def engine_of(loaded: LoadedModel) -> Engine:
    return Engine(loaded, EngineConfig(model="tiny", kv_memory="1MiB", threads=1))


@pytest.fixture(scope="module")
def shared(loaded: LoadedModel) -> Engine:
    return engine_of(loaded)


def ask(form: dict[str, Any], **how: Any) -> Request:
    asked = {"max_tokens": 100, "temperature": 1.0, "seed": 3, "structured_outputs": form, **how}
    return Request(prompt="Say: ", params=SamplingParams.from_wire(asked))


def drain(engine: Engine) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {}
    while not engine.idle:
        for event in engine.step():
            events.setdefault(event.job_id, []).append(event)
    return events


def choice_of(events: list[Event]) -> Choice:
    assert isinstance(events[-1], FinishedEvent)
    return events[-1].result.choices[0]


def error_of(events: list[Event]) -> Exception:
    assert isinstance(events[-1], FailedEvent)
    return events[-1].error


@pytest.mark.parametrize("form", FORMS)
def test_every_answer_has_its_form_and_ends_by_itself_beside_others_without(shared: Engine, form: str) -> None:
    for seed in range(6):
        shared.add(str(seed), ask(FORMS[form], seed=seed, ignore_eos=bool(seed % 2), temperature=seed / 4))
    free = SamplingParams(max_tokens=20, ignore_eos=True)
    shared.add("free", Request(prompt="Say: ", params=free))
    events = drain(shared)
    [alone] = shared.generate([Request(prompt="Say: ", params=free)])

    assert choice_of(events["free"]) == alone.choices[0]
    ended = [choice for seed in range(6) if (choice := choice_of(events[str(seed)])).finish_reason == "stop"]
    assert len(ended) >= 3
    assert [choice.text for choice in ended if not holds(form, choice.text)] == []
    assert all(choice.token_ids[-1] == END for choice in ended)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_taken_up_at_any_token_goes_on_as_if_undisturbed(shared: Engine, form: str) -> None:
    shared.add("job", ask(FORMS[form], n=2))
    whole = drain(shared)["job"]
    first = choice_of(whole)

    for cut in range(len(first.token_ids) + 1):
        shared.add("other", ask({"regex": "[a-z]*"}, max_tokens=4))
        shared.add("job", ask(FORMS[form], n=2), (Emitted(token_ids=first.token_ids[:cut]),))
        rest = drain(shared)["job"]
        assert isinstance(whole[-1], FinishedEvent)
        assert isinstance(rest[-1], FinishedEvent)
        assert rest[-1].result.choices == whole[-1].result.choices, cut
        again = [event.token_ids for event in rest if isinstance(event, TokenEvent) and event.index == 0]
        assert again == [(token_id,) for token_id in first.token_ids[cut:]]


def test_it_goes_with_penalties_min_tokens_and_filters(shared: Engine) -> None:
    how = {"frequency_penalty": 2.0, "min_tokens": 30, "top_p": 0.9, "top_k": 5, "bad_words": ["a"]}
    shared.add("job", ask(FORMS["regex"], **how))

    assert re.fullmatch("(cd){2,4}[0-9]", choice_of(drain(shared)["job"]).text), "the form goes before min_tokens"


BOMBS: dict[str, dict[str, Any]] = {
    "no regex": {"regex": "(("},
    "nested": {"regex": "(" * 2000 + "a" + ")" * 2000},
    "long": {"regex": "[a-z]*" * 600},
    "no grammar": {"grammar": "start: nowhere"},
    "nested grammar": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "product": {
        "json": {"allOf": [{"oneOf": [{"properties": {f"a{i}{j}": {"const": j}}} for j in range(9)]} for i in range(9)]}
    },
    "lacking": {"json": {"type": "array", "uniqueItems": True}},
    "elsewhere": {"json": {"$ref": "file:///etc/passwd"}},
    "no schema": {"json": {"type": "nothing"}},
    "repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_grammar_that_bursts_fails_its_own_job_and_says_so(shared: Engine, name: str) -> None:
    shared.add("bomb", ask(BOMBS[name], n=2, logit_bias={"64": 100}))  # the letter a, on and on
    shared.add("good", ask(FORMS["regex"]))
    shared.add("free", Request(prompt="a", params=SamplingParams(max_tokens=30, ignore_eos=True)))
    events = drain(shared)
    error = error_of(events["bomb"])

    assert isinstance(error, GrammarRefused)
    assert error.to_wire()["code"] == "grammar_refused"
    assert error.to_wire()["param"] == "params.structured_outputs"
    assert len(str(error)) < 300
    assert ("gave up after" in str(error)) == (name in ("repeats", "long"))
    assert holds("regex", choice_of(events["good"]).text)
    assert len(choice_of(events["free"]).token_ids) == 30
    assert sum(isinstance(event, FailedEvent) for event in events["bomb"]) == 1
    assert (shared.idle, shared.room) == (True, 32)


def test_used_alone_the_engine_raises_what_a_job_failed_with(shared: Engine) -> None:
    with pytest.raises(GrammarRefused):
        shared.generate([ask(FORMS["regex"]), ask(BOMBS["no regex"])])
    assert shared.idle


def test_published_tokens_that_are_not_of_the_form_fail_the_job(shared: Engine) -> None:
    shared.add("job", ask({"regex": "ab"}), (Emitted(token_ids=(64, 64)),))

    assert "gave up after 2 tokens" in str(error_of(drain(shared)["job"]))


class Stuck:
    """A matcher with no next token, or one in error that still writes a mask."""

    def __init__(self, *, error: bool) -> None:
        self.error = error

    def deep_copy(self) -> Stuck:
        return self

    def consume_tokens(self, tokens: list[int]) -> bool:
        return True

    def unsafe_compute_mask_ptr(self, pointer: int, size: int) -> None:
        ctypes.memset(pointer, 255 if self.error else 0, size)

    def is_error(self) -> bool:
        return self.error

    def get_error(self) -> str:
        return "stuck"


@pytest.mark.parametrize("error", [True, False])
def test_a_grammar_with_no_next_token_gives_up_and_leaves_the_row_as_it_was(error: bool) -> None:
    stuck: Any = Stuck(error=error)
    mask = torch.full((3,), 5, dtype=torch.int32)

    assert "gave up after 1 tokens: stuck" in str(Constraint(stuck).allow([7], mask))
    assert mask.tolist() == [5, 5, 5]


class Slow:
    """llguidance's matcher, as slow as a test wants."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.compiled: list[str] = []

    def __call__(self, tokenizer: Any, text: str, **more: Any) -> LLMatcher:
        self.compiled.append(text)
        if "slow" in text:
            self.go.wait(30)
        return LLMatcher(tokenizer, text, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(LLMatcher, name)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    slow = Slow()
    monkeypatch.setattr(grammar, "LLMatcher", slow)
    return slow


def test_a_job_waits_for_its_grammar_while_others_go_on(loaded: LoadedModel, slow: Slow) -> None:
    engine = engine_of(loaded)
    engine.add("slow", ask({"regex": "slow"}, n=2))
    assert (engine.room, engine.idle) == (30, False)
    engine.add("free", Request(prompt="a", params=SamplingParams(max_tokens=5, ignore_eos=True)))
    early = [event for _ in range(12) for event in engine.step()]
    slow.go.set()
    late = drain(engine)

    assert {event.job_id for event in early} == {"free"}
    assert isinstance(early[-1], FinishedEvent)
    assert choice_of(late["slow"]).text == "slow"


def test_a_step_in_which_all_wait_for_grammars_does_not_spin(loaded: LoadedModel, slow: Slow) -> None:
    engine = engine_of(loaded)
    engine.add("slow", ask({"regex": "slow"}))
    began, cpu = time.monotonic(), time.thread_time()
    while time.monotonic() < began + 0.3:
        assert engine.step() == []
    assert time.thread_time() - cpu < 0.2
    assert engine.stats.steps < 40
    slow.go.set()

    assert choice_of(drain(engine)["slow"]).text == "slow"


@pytest.mark.parametrize("way", ["cancel", "drop"])
def test_a_job_that_waits_for_its_grammar_can_be_let_go(loaded: LoadedModel, slow: Slow, way: str) -> None:
    engine = engine_of(loaded)
    engine.add("slow", ask({"regex": "slow"}))
    getattr(engine, way)("slow")
    events = drain(engine)
    slow.go.set()
    engine.add("again", ask({"regex": "slow"}))

    assert (choice_of(events["slow"]).finish_reason == "cancelled") if way == "cancel" else events == {}
    assert choice_of(drain(engine)["again"]).text == "slow"
    assert engine.room == 32


def test_a_grammar_that_compiles_too_long_fails_its_job_and_no_other(
    loaded: LoadedModel, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.1)
    engine = engine_of(loaded)
    engine.add("slow", ask({"regex": "slow"}))
    engine.add("good", ask(FORMS["regex"]))
    events = drain(engine)
    slow.go.set()

    assert "takes longer than 0.1 s to compile" in str(error_of(events["slow"]))
    assert holds("regex", choice_of(events["good"]).text)


def test_many_jobs_of_one_form_compile_it_once_and_the_latest_forms_are_kept(
    loaded: LoadedModel, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "KEPT", 3)
    engine = engine_of(loaded)
    for number in range(8):
        engine.add(str(number), ask({"regex": "a"}))
    drain(engine)
    assert len(slow.compiled) == 1
    for text in "bcd":
        engine.add(text, ask({"regex": text}))
        drain(engine)
    engine.add("d again", ask({"regex": "d"}))
    engine.add("a again", ask({"regex": "a"}))
    drain(engine)

    assert len(slow.compiled) == 5


def test_a_model_without_bytes_or_end_refuses_by_name(loaded: LoadedModel, tmp_path: Path) -> None:
    words = Engine.load(EngineConfig(model=str(make_with_words(tmp_path)), dtype="float32", kv_memory="1MiB"))
    assert not Grammars(loaded.tokenizer, 260, ()).supported
    assert not Grammars(None, 260, (END,)).supported

    with pytest.raises(UnsupportedRequest, match="structured_outputs"):
        words.add("job", ask({"regex": "a"}))
    assert words.idle


@pytest.mark.weights
def test_smollm2_answers_in_json_of_a_schema_beside_free_answers() -> None:
    engine = Engine.load(EngineConfig(dtype="float32", threads=2, kv_memory="256MiB"))
    prompt = "A person as JSON with name, age: "
    schema = {**SCHEMA, "properties": {**SCHEMA["properties"], "name": {"type": "string", "maxLength": 20}}}
    forms: list[dict[str, Any]] = [
        {"json": schema},
        {"regex": "[A-Z][a-z]{2,9} is [0-9]{2}"},
        {"choice": ["yes", "no"]},
    ]
    params = [SamplingParams.from_wire({"structured_outputs": form, "max_tokens": 60}) for form in forms]
    free = SamplingParams(max_tokens=12)
    results = engine.generate([Request(prompt=prompt, params=how) for how in [*params, free]])
    person, text, word, other = (result.choices[0] for result in results)

    assert set(json.loads(person.text)) == {"name", "age"}
    assert re.fullmatch("[A-Z][a-z]{2,9} is [0-9]{2}", text.text)
    assert word.text in ("yes", "no")
    assert [choice.finish_reason for choice in (person, text, word)] == ["stop"] * 3
    assert other == engine.generate([Request(prompt=prompt, params=free)])[0].choices[0]


choices = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(choices, st.integers(0, 9))
def test_any_texts_can_be_the_choices(shared: Engine, texts: list[str], seed: int) -> None:
    shared.add("job", ask({"choice": texts}, seed=seed))
    choice = choice_of(drain(shared)["job"])

    assert choice.text in texts
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("wrong", "param", "bound"),
    [
        ({}, "", "exactly one of"),
        ({"regex": "a", "json": {}}, "", "exactly one of"),
        ({"regex": ""}, ".regex", "1 to 4096 characters"),
        ({"regex": None}, ".regex", "1 to 4096 characters"),
        ({"grammar": "a" * 65_537}, ".grammar", "1 to 65536 characters"),
        ({"choice": []}, ".choice", "1 to 256 strings"),
        ({"choice": ["a" * 1025]}, ".choice", "1 to 1024 characters"),
        ({"json": []}, ".json", "an object"),
        ({"json": {"a": "b" * 65_536}}, ".json", "65536 characters"),
        ({"json_object": False}, ".json_object", "true"),
    ],
)
def test_a_form_out_of_its_bound_is_refused_by_name_and_bound(wrong: dict[str, Any], param: str, bound: str) -> None:
    with pytest.raises(InvalidField, match=bound) as raised:
        SamplingParams.from_wire({"structured_outputs": wrong})

    assert raised.value.param == f"params.structured_outputs{param}"


def test_a_schema_may_be_32_deep_and_no_deeper() -> None:
    nested: dict[str, Any] = {}
    for _ in range(31):
        nested = {"items": nested}

    assert Structured.from_wire({"json": nested}).to_wire() == {"json": nested}
    with pytest.raises(InvalidField, match="32 deep"):
        Structured.from_wire({"json": {"not": nested}})


@pytest.mark.parametrize("form", [*FORMS.values(), {"json_object": True}])
def test_a_form_goes_over_the_wire_and_back(form: dict[str, Any]) -> None:
    params = SamplingParams.from_wire({"structured_outputs": form})

    assert SamplingParams.from_wire(json.loads(json.dumps(params.to_wire()))) == params
    assert params.to_wire() == {"structured_outputs": form}
