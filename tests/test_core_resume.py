"""What a job says depends on its request alone: not on neighbours, slices, memory places or crashes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from core.engine import Engine, EngineConfig
from core.request import Choice, Emitted, Event, FinishedEvent, Kind, Message, Request, SamplingParams, TokenEvent
from tests.tiny_models import VOCAB, TinyModel, make

STYLES = [
    SamplingParams(max_tokens=14),
    SamplingParams(max_tokens=14, temperature=0.8),
    SamplingParams(max_tokens=14, temperature=1.5, top_p=0.8),
    SamplingParams(max_tokens=14, temperature=1.2, top_k=4, seed=11),
    SamplingParams(max_tokens=14, temperature=1.0, min_p=0.05, logprobs=2),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make("llama", tmp_path_factory.mktemp("llama"))


def engine_of(folder: Path, step_tokens: int = 256, max_running: int = 8) -> Engine:
    return Engine.load(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            step_tokens=step_tokens,
            max_running=max_running,
            kv_memory="1MiB",
            threads=1,
        )
    )


def random_request(draw: random.Random) -> Request:
    prompt = tuple(draw.randrange(VOCAB) for _ in range(draw.randint(1, 30)))
    return Request(token_ids=prompt, params=draw.choice(STYLES))


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    return events


def choice_of(events: list[Event], job_id: str) -> Choice:
    [result] = [event.result for event in events if isinstance(event, FinishedEvent) and event.job_id == job_id]
    return result.choices[0]


def same(one: Choice, other: Choice) -> bool:
    """Equal, up to the last digits of log-probabilities."""
    if (one.text, one.token_ids, one.finish_reason) != (other.text, other.token_ids, other.finish_reason):
        return False
    pairs = list(zip(one.logprobs or (), other.logprobs or (), strict=True))
    return all(a.token_id == b.token_id and abs(a.logprob - b.logprob) < 1e-5 for a, b in pairs)


@pytest.mark.parametrize("seed", range(8))
def test_a_sampled_answer_does_not_depend_on_its_neighbours_or_on_slicing(tiny: TinyModel, seed: int) -> None:
    draw = random.Random(seed)
    requests = {f"job-{seed}-{number}": random_request(draw) for number in range(8)}
    alone = {}
    quiet = engine_of(tiny.folder)
    for job_id, request in requests.items():
        quiet.add(job_id, request)
        alone[job_id] = choice_of(drain(quiet), job_id)

    busy = engine_of(tiny.folder, step_tokens=draw.randint(2, 20), max_running=draw.randint(2, 8))
    for job_id, request in requests.items():
        busy.add(job_id, request)
        if draw.random() < 0.5:
            busy.add("gone", random_request(draw))
            busy.drop("gone")
    events = drain(busy)

    for job_id, expected in alone.items():
        assert same(choice_of(events, job_id), expected)


@pytest.mark.parametrize("params", STYLES)
def test_an_answer_taken_up_at_any_token_goes_on_as_if_undisturbed(tiny: TinyModel, params: SamplingParams) -> None:
    request = Request(token_ids=(5, 9, 33, 2, 7), params=params)
    engine = engine_of(tiny.folder)
    engine.add("job", request)
    undisturbed = drain(engine)
    whole = choice_of(undisturbed, "job")
    published = [event for event in undisturbed if isinstance(event, TokenEvent)]

    for cut in range(len(whole.token_ids) + 1):
        logprobs = () if whole.logprobs is None else whole.logprobs[:cut]
        engine = engine_of(tiny.folder, step_tokens=3 + cut)
        engine.add("other", Request(token_ids=(1, 2, 3), params=STYLES[1]))
        engine.add("job", request, (Emitted(token_ids=whole.token_ids[:cut], logprobs=logprobs),))
        events = drain(engine)

        assert same(choice_of(events, "job"), whole)
        again = [event for event in events if isinstance(event, TokenEvent) and event.job_id == "job"]
        assert [event.token_ids for event in again] == [event.token_ids for event in published[cut:]]


def test_without_a_seed_the_job_id_decides_and_with_one_the_seed(tiny: TinyModel) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5, ignore_eos=True)
    seeded = SamplingParams(max_tokens=20, temperature=1.5, ignore_eos=True, seed=7)
    engine = engine_of(tiny.folder)
    for job_id, how in [("a", params), ("b", params), ("c", seeded), ("d", seeded)]:
        engine.add(job_id, Request(token_ids=(5, 6), params=how))
    events = drain(engine)

    a, b, c, d = (choice_of(events, name).token_ids for name in "abcd")
    assert a != b
    assert c == d


def test_a_cancelled_job_ends_in_the_next_step_with_what_it_has(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    engine.add("a", Request(token_ids=(5, 6), params=params))
    engine.add("b", Request(token_ids=(8, 6), params=params))
    tokens = [event.token_ids for _ in range(4) for event in engine.step() if event.job_id == "a"]  # type: ignore[union-attr]
    engine.cancel("a", "deadline")
    engine.cancel("unknown")

    [first, *others] = engine.step()

    assert isinstance(first, FinishedEvent)
    assert first.result.choices[0].finish_reason == "deadline"
    assert first.result.choices[0].token_ids == tuple(token for ids in tokens for token in ids)
    assert {event.job_id for event in others} == {"b"}


def test_a_dropped_job_says_nothing_more_and_frees_its_memory(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder, max_running=2)
    engine.add("a", Request(token_ids=(5, 6)))
    engine.step()
    engine.drop("a")
    engine.drop("a")

    assert engine.step() == []
    assert engine.idle
    assert engine.room == 2


def test_a_job_that_finds_no_memory_waits_and_then_runs(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder)  # 1 MiB holds less than 20 sequences of 128 tokens
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    small = Engine.load(EngineConfig(model=str(tiny.folder), dtype="float32", kv_memory="100kB", threads=1))
    for number in range(5):
        small.add(str(number), Request(token_ids=(5, number), params=params))
        engine.add(str(number), Request(token_ids=(5, number), params=params))
    expected, events = drain(engine), drain(small)
    assert small.stats.preemptions > 0

    for number in range(5):
        assert same(choice_of(events, str(number)), choice_of(expected, str(number)))


def test_counters_tell_what_was_computed(tiny: TinyModel) -> None:
    engine = engine_of(tiny.folder)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    engine.generate([Request(token_ids=(5, 6, 7), params=params), Request(token_ids=(5, 6), params=params)])
    engine.generate([Request(kind=Kind.PREDICT, token_ids=(5, 6, 7))])

    assert engine.stats.prompt_tokens == 8
    assert engine.stats.generated_tokens == 10
    assert engine.stats.decode_rows == {2: 5}
    assert engine.stats.steps == 6


@pytest.fixture(scope="module")
def smollm2() -> Engine:
    return Engine.load(EngineConfig(dtype="float32", threads=2, kv_memory="256MiB", step_tokens=64))


@pytest.mark.weights
def test_smollm2_says_in_a_mix_what_transformers_generate_says(smollm2: Engine) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from core.models.source import resolve

    folder = resolve("smollm2-135m")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = ["Once upon a time", "The sea was", "def fibonacci(n):\n", "In the year 1815, " * 9, "Water boils at"]
    params = SamplingParams(max_tokens=20, ignore_eos=True)

    results = smollm2.generate([Request(prompt=text, params=params) for text in texts])

    for text, result in zip(texts, results, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None)
        expected = output[0, ids["input_ids"].shape[1] :]
        assert list(result.choices[0].token_ids) == expected.tolist()
        assert result.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.weights
def test_a_chat_goes_through_the_models_template_and_ends_with_its_turn(smollm2: Engine) -> None:
    messages = (Message(role="user", content="What is the capital of France?"),)

    [result] = smollm2.generate([Request(messages=messages)])

    assert result.choices[0].text == "The capital of France is Paris."
    assert result.choices[0].finish_reason == "stop"


@pytest.mark.weights
def test_smollm2_taken_up_in_a_full_batch_says_the_same_with_the_same_log_probabilities(smollm2: Engine) -> None:
    """Where the two likeliest logits are less than 1e-4 apart either token is right; such places are counted."""
    from transformers import AutoTokenizer

    from benchmarks.resume import measure
    from benchmarks.workload import english
    from core.models.source import resolve

    ids = AutoTokenizer.from_pretrained(resolve("smollm2-135m"))(english())["input_ids"]
    found = measure(smollm2, [ids[start : start + 40] for start in range(0, 160, 40)], cuts=2)
    print(f"{found.near_ties} near-ties in {found.resumed} answers")

    assert found.resumed == 8
    assert found.equal + found.near_ties == found.resumed
    assert found.worst_logprob <= 1e-3


@pytest.mark.weights
def test_text_taken_up_at_any_token_is_the_undisturbed_text_with_its_stop(smollm2: Engine) -> None:
    messages = (Message(role="user", content="Write one line full of emoji 🌈 and 漢字."),)
    params = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=4, stop=("\n\n", "qqq"), ignore_eos=True)
    request = Request(messages=messages, params=params)
    smollm2.add("job", request)
    undisturbed = drain(smollm2)
    whole = choice_of(undisturbed, "job")
    pieces = [event.text for event in undisturbed if isinstance(event, TokenEvent)]
    assert "".join(pieces) == whole.text

    for cut in range(0, len(pieces) + 1, 3):
        smollm2.add("job", request, (Emitted(token_ids=whole.token_ids[:cut]),))
        events = drain(smollm2)
        assert choice_of(events, "job") == whole
        assert [event.text for event in events if isinstance(event, TokenEvent)] == pieces[cut:]
