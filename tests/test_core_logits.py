"""Bias, penalties and forbidden tokens: each row by its own parameters, as a slow loop over tokens would do it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.answer import Answer
from core.engine import Engine, EngineConfig
from core.errors import InvalidField, UnsupportedRequest
from core.logits import Ruled, Rules, adjust, rules_of
from core.models.load import LoadedModel, load_model
from core.request import Choice, Emitted, FinishedEvent, Request, SamplingParams
from core.sampler import Draw, draw
from core.tokenizer import Tokenizer
from tests.tiny_models import VOCAB, make, make_with_words

END = 2


def slowly(logits: list[float], rules: Rules, tokens: list[int]) -> list[float]:
    """One row, one token after the other."""
    params, prompt, answer = rules.params, tokens[: rules.prompt_tokens], tokens[rules.prompt_tokens :]
    said, values = Counter(answer), [*logits]
    for token_id, bias in params.logit_bias:
        values[token_id] += bias
    for token_id in range(len(values)):
        if token_id in answer or token_id in prompt:
            factor = params.repetition_penalty
            values[token_id] = values[token_id] / factor if values[token_id] > 0 else values[token_id] * factor
        values[token_id] -= params.frequency_penalty * said[token_id]
        values[token_id] -= params.presence_penalty * (token_id in answer)
    forbidden = {word[-1] for word in rules.bad_words if answer[len(answer) - len(word) + 1 :] == [*word[:-1]]}
    if len(answer) < params.min_tokens:
        forbidden |= {*rules.early}
    banned = [-math.inf if token_id in forbidden else value for token_id, value in enumerate(values)]
    return values if max(banned) == -math.inf else banned


token_ids = st.integers(0, 11)
penalties = st.sampled_from([0.0, 0.0, 0.5, -1.25, 2.0])
params = st.builds(
    SamplingParams,
    presence_penalty=penalties,
    frequency_penalty=penalties,
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.75]),
    logit_bias=st.dictionaries(token_ids, st.sampled_from([-100, 0.5, 7]), max_size=4).map(lambda d: tuple(d.items())),
    min_tokens=st.integers(0, 6),
)
words = st.lists(st.lists(token_ids, min_size=1, max_size=3), max_size=13)
texts = st.lists(token_ids, min_size=1, max_size=200) | st.lists(st.integers(0, 2), min_size=1, max_size=8)


@st.composite
def rows(draw_from: st.DrawFn) -> list[tuple[Rules | None, list[int]]]:
    found = []
    for _ in range(draw_from(st.integers(1, 5))):
        tokens = draw_from(texts)
        prompt = draw_from(st.integers(1, len(tokens)))
        found.append((rules_of(draw_from(params), prompt, {END, 5}, draw_from(words)), tokens))
    return found


@settings(max_examples=300, deadline=None)
@given(rows(), st.integers(0, 1000))
def test_a_mix_of_rows_is_changed_as_a_loop_over_its_tokens_would(
    mix: list[tuple[Rules | None, list[int]]], seed: int
) -> None:
    logits = torch.randn(len(mix), 12, generator=torch.Generator().manual_seed(seed)) * 3
    ruled = [Ruled(row, rules, tokens) for row, (rules, tokens) in enumerate(mix) if rules is not None]
    before = logits.clone()
    adjust(logits, ruled)

    for row, (rules, tokens) in enumerate(mix):
        if rules is None:
            assert torch.equal(logits[row], before[row])
        else:
            expected = torch.tensor(slowly(before[row].tolist(), rules, tokens))
            torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(texts, st.data())
def test_rules_that_saw_every_token_and_rules_that_see_them_late_say_the_same(text: list[int], data: Any) -> None:
    prompt = data.draw(st.integers(1, len(text)))
    how = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.5, presence_penalty=0.25)
    patient, late = (Rules(how, prompt) for _ in range(2))
    logits = torch.randn(1, 12)
    for length in range(prompt, len(text) + 1):
        one = logits.clone()
        adjust(one, [Ruled(0, patient, text[:length])])
    other = logits.clone()
    adjust(other, [Ruled(0, late, text)])

    assert torch.equal(one, other)


def test_parameters_that_ask_for_nothing_have_no_rules_and_the_logits_are_the_very_same() -> None:
    assert rules_of(SamplingParams(temperature=1.0, seed=3, stop_token_ids=(4,)), 3, {END}, ()) is None
    assert rules_of(SamplingParams(min_tokens=3, ignore_eos=True), 3, (), ()) is None


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(1, 12)
    rules = rules_of(SamplingParams(logit_bias=((7, 100.0),)), 1, (), ())
    [drawn] = draw(logits, [Draw(SamplingParams(logprobs=1), 0, 0, rules=rules, tokens=[1])])

    assert drawn.token_id == 7
    assert drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(float(torch.log_softmax(logits[0], -1)[7]), abs=1e-5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(make("llama", tmp_path_factory.mktemp("m")).folder, name="tiny", dtype="float32", device="cpu")


def compute(loaded: LoadedModel, how: SamplingParams, *emitted: Emitted, prompt: tuple[int, ...] = (5, 9)) -> Choice:
    engine = Engine(loaded, EngineConfig(model="tiny", kv_memory="1MiB", threads=1))
    engine.add("other", Request(token_ids=(3, 4), params=SamplingParams(max_tokens=6, frequency_penalty=-2.0)))
    engine.add("job", Request(token_ids=prompt, params=how), emitted)
    found: list[Choice] = []
    while not engine.idle:
        events = [event for event in engine.step() if isinstance(event, FinishedEvent) and event.job_id == "job"]
        found += [choice for event in events for choice in event.result.choices]
    [choice] = found
    return choice


PLAIN = SamplingParams(max_tokens=14, temperature=1.2, seed=11, ignore_eos=True)
STYLES: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 2.0, "temperature": 0.0},
    "repetition": {"repetition_penalty": 2.0, "temperature": 0.0},
    "bias": {"logit_bias": ((7, 5.0), (8, -100.0))},
    "early": {"min_tokens": 9, "ignore_eos": False, "stop_token_ids": tuple(range(0, 64, 3))},
    "all": {"presence_penalty": -1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "min_tokens": 4},
}


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_taken_up_at_any_token_goes_on_as_if_undisturbed(loaded: LoadedModel, style: str) -> None:
    how = dataclasses.replace(PLAIN, **STYLES[style])
    whole = compute(loaded, how)

    assert whole != compute(loaded, PLAIN), "the parameter changed nothing: that proves nothing"
    for cut in range(len(whole.token_ids) + 1):
        assert compute(loaded, how, Emitted(token_ids=whole.token_ids[:cut])) == whole, cut


def test_a_frequency_penalty_makes_greedy_answers_leave_their_loop(loaded: LoadedModel) -> None:
    plain = compute(loaded, dataclasses.replace(PLAIN, temperature=0.0, max_tokens=40))
    varied = compute(loaded, dataclasses.replace(PLAIN, temperature=0.0, max_tokens=40, frequency_penalty=2.0))

    assert len(set(varied.token_ids)) > len(set(plain.token_ids))


def test_a_stop_token_ends_the_answer_and_min_tokens_keeps_it_away(loaded: LoadedModel) -> None:
    plain = compute(loaded, PLAIN)
    stop = plain.token_ids[3]
    stopped = compute(loaded, dataclasses.replace(PLAIN, stop_token_ids=(stop,)))
    first = plain.token_ids.index(stop)
    longer = compute(loaded, dataclasses.replace(PLAIN, stop_token_ids=(stop,), min_tokens=12))

    assert (stopped.token_ids, stopped.finish_reason) == (plain.token_ids[: first + 1], "stop")
    assert len(longer.token_ids) >= 12
    assert stop not in longer.token_ids[:12]


@pytest.fixture(scope="module")
def words_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_with_words(tmp_path_factory.mktemp("words"))
    return Engine.load(EngineConfig(model=str(folder), dtype="float32", kv_memory="1MiB", threads=1))


def say(engine: Engine, **how: Any) -> str:
    asked = {"max_tokens": 20, "ignore_eos": True, **how}
    return engine.generate([Request(prompt="w5 w9", params=SamplingParams.from_wire(asked))])[0].choices[0].text


def test_bad_words_are_never_said_and_their_parts_are(words_engine: Engine) -> None:
    words = say(words_engine).split()
    single = say(words_engine, bad_words=[words[2]])
    pair = say(words_engine, bad_words=[f"{words[2]} {words[3]}"])

    assert words[2] not in single.split()
    assert f"{words[2]} {words[3]}" not in pair
    assert pair.split()[:3] == words[:3]


def test_a_stop_string_is_not_looked_for_in_the_first_min_tokens(words_engine: Engine) -> None:
    words = say(words_engine, temperature=1.5, seed=4).split()
    stop = words[4]
    later = next((place for place, word in enumerate(words) if place > 6 and word == stop), len(words))

    assert say(words_engine, temperature=1.5, seed=4, stop=[stop]).split() == words[: words.index(stop)]
    assert say(words_engine, temperature=1.5, seed=4, stop=[stop], min_tokens=7).split() == words[:later]


def test_text_of_the_first_min_tokens_is_not_held_back_and_later_text_is() -> None:
    class Letters:
        def push(self, token_id: int) -> str:
            return chr(token_id)

    answer = Answer(stream=Letters(), stop=("ab", "cd"), min_tokens=4)
    pieces = [answer.push(ord(letter), last=False) for letter in "abxcdyc"]

    assert pieces == ["a", "b", "x", "c", "d", "y", ""]
    assert (answer.push(ord("d"), last=False), answer.text, answer.finish_reason) == ("", "abxcdy", "stop")


class Spaced:
    """A tokenizer of letters, to which a word after a space is another token."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        if text[0] == " " and not text[1].isdigit():
            return {"input_ids": [100 + ord(text[1]), *map(ord, text[2:])]}
        return {"input_ids": [*map(ord, text)]}


def test_a_bad_word_is_meant_with_and_without_a_space_before_it() -> None:
    assert Tokenizer(Spaced()).encode_words([" ab", "c"]) == [[97, 98], [197, 98], [99], [199]]
    assert Tokenizer(Spaced()).encode_words(["7"]) == [[55]], "a space by itself is no part of the word"


@pytest.mark.parametrize(
    ("wrong", "param", "bound"),
    [
        ({"presence_penalty": 2.5}, "params.presence_penalty", "from -2.0 to 2.0"),
        ({"frequency_penalty": "1"}, "params.frequency_penalty", "a number"),
        ({"repetition_penalty": 0}, "params.repetition_penalty", "above 0.0 and at most 2.0"),
        ({"logit_bias": {"5": 101}}, "params.logit_bias.5", "from -100.0 to 100.0"),
        ({"logit_bias": {"five": 1}}, "params.logit_bias", "token ids as its keys"),
        ({"logit_bias": {"05": 1}}, "params.logit_bias", "token ids as its keys"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "params.logit_bias", "at most 300"),
        ({"min_tokens": 65}, "params.min_tokens", "at most max_tokens, 64"),
        ({"stop_token_ids": [-1]}, "params.stop_token_ids", "from 0 to"),
        ({"stop_token_ids": [1] * 129}, "params.stop_token_ids", "1 to 128"),
        ({"bad_words": [""]}, "params.bad_words", "1 to 256 characters"),
        ({"bad_words": "word"}, "params.bad_words", "a list of strings"),
    ],
)
def test_a_value_out_of_its_bound_is_refused_by_name_and_bound(wrong: dict[str, Any], param: str, bound: str) -> None:
    with pytest.raises(InvalidField, match=bound) as raised:
        SamplingParams.from_wire(wrong)

    assert raised.value.param == param


def test_ids_outside_the_vocabulary_and_words_without_a_tokenizer_are_refused(loaded: LoadedModel) -> None:
    engine = Engine(loaded, EngineConfig(model="tiny", kv_memory="1MiB", threads=1))
    for how in ({"stop_token_ids": [VOCAB]}, {"logit_bias": {str(VOCAB): 1}}):
        with pytest.raises(InvalidField, match=f"below {VOCAB}"):
            engine.add("job", Request(token_ids=(5,), params=SamplingParams.from_wire(how)))
    with pytest.raises(UnsupportedRequest, match="bad_words"):
        engine.add("job", Request(token_ids=(5,), params=SamplingParams(bad_words=("a",))))

    assert engine.idle


def test_every_parameter_goes_over_the_wire_and_back() -> None:
    how = SamplingParams(
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        logit_bias=((5, -1.5), (0, 2)),
        min_tokens=3,
        stop_token_ids=(4, 5),
        bad_words=("a", "b c"),
    )

    assert SamplingParams.from_wire(how.to_wire()) == how
    assert how.to_wire()["logit_bias"] == {"5": -1.5, "0": 2}
