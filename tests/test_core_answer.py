"""Text grows by whole characters, ends before its stop string, and shows nothing it would have to take back."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from core.answer import Answer, NoText
from core.errors import UnsupportedRequest
from core.request import Message
from core.tokenizer import Detokenizer, Tokenizer

TEXTS = [
    "The quick brown fox — “jumps” over the lazy dog.",
    "Emoji: 🌈💖👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇫🇷🇯🇵 close together.",
    "漢字とかなとカナ、한국어, العربية, Ελληνικά, русский язык.",
    "code:\n\tdef f(x):\n\t\treturn x  # naïve café\n\n\n",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀𓂀 zero\u200bwidth",
]


class Letters:
    """A stream where token n is the nth of some texts."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def push(self, token_id: int) -> str:
        return self._texts[token_id]


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Byte-level, so few merges that most characters are several tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>"))


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [stream.push(token_id) for token_id in ids]


@pytest.mark.parametrize("text", [*TEXTS, "".join(TEXTS) * 3])
def test_the_joined_pieces_are_the_decoded_text_and_none_holds_half_a_character(
    byte_tokenizer: Tokenizer, text: str
) -> None:
    ids = byte_tokenizer.encode(text)
    pieces = pieces_of(byte_tokenizer, ids)

    assert "".join(pieces) == byte_tokenizer.decode(ids) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80))
def test_any_text_comes_out_whole(byte_tokenizer: Tokenizer, text: str) -> None:
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")

    assert "".join(pieces_of(byte_tokenizer, byte_tokenizer.encode(text))) == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=150))
def test_any_ids_come_out_as_their_decoding_but_for_an_unfinished_end(
    byte_tokenizer: Tokenizer, ids: list[int]
) -> None:
    ids = [token_id for token_id in ids if token_id < byte_tokenizer_size(byte_tokenizer)]
    joined, decoded = "".join(pieces_of(byte_tokenizer, ids)), byte_tokenizer.decode(ids)

    assert decoded.startswith(joined)
    assert set(decoded[len(joined) :]) <= {"\N{REPLACEMENT CHARACTER}"}


def byte_tokenizer_size(tokenizer: Tokenizer) -> int:
    return len(tokenizer._tokenizer)


def test_a_long_answer_is_not_decoded_anew_at_each_token(byte_tokenizer: Tokenizer) -> None:
    lengths: list[int] = []

    def decode(ids: object) -> str:
        assert isinstance(ids, list)
        lengths.append(len(ids))
        return byte_tokenizer.decode(ids)

    stream = Detokenizer(decode)
    for token_id in byte_tokenizer.encode("".join(TEXTS) * 5):
        stream.push(token_id)

    assert max(lengths) <= 40


def test_garbage_is_not_held_for_ever(byte_tokenizer: Tokenizer) -> None:
    half = byte_tokenizer.encode("🌈")[0]

    assert "".join(pieces_of(byte_tokenizer, [half] * 200))


def answer_pieces(texts: list[str], stop: tuple[str, ...]) -> tuple[Answer, list[str]]:
    """Push until the answer ends."""
    answer, pieces = Answer(Letters(texts), stop), []
    for number in range(len(texts)):
        pieces.append(answer.push(number, last=number == len(texts) - 1))
        if answer.finish_reason:
            break
    return answer, pieces


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), min_size=1, max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
def test_text_ends_before_the_first_stop_string_wherever_tokens_are_cut(texts: list[str], stops: list[str]) -> None:
    answer, pieces = answer_pieces(texts, tuple(stops))

    shown, read = "".join(pieces), "".join(texts[: len(pieces)])
    found = [at for stop in stops if (at := read.find(stop)) >= 0]
    assert shown == answer.text == (read[: min(found)] if found else read)
    assert answer.finish_reason == ("stop" if found else "length")
    earlier = "".join(texts[: len(pieces) - 1])
    assert not any(stop in earlier for stop in stops)  # it ended with the token that completed a stop string


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=10), st.text("ab", min_size=1, max_size=4))
def test_only_what_may_begin_a_stop_string_is_held_back(texts: list[str], stop: str) -> None:
    answer = Answer(Letters(texts), (stop,))
    for number in range(len(texts)):
        answer.push(number, last=False)
        if answer.finish_reason:
            return
        assert stop.startswith(answer.held)


def test_an_end_token_ends_the_answer_without_text_and_releases_what_was_held() -> None:
    answer = Answer(Letters(["ab", "END"]), ("abc",), end_ids={1})

    assert answer.push(0, last=False) == ""
    assert answer.push(1, last=False) == "ab"
    assert answer.finish_reason == "stop"


def test_a_model_without_a_tokenizer_has_no_text() -> None:
    answer = Answer(NoText(), ("x",))
    assert [answer.push(random.randrange(9), last=False) for _ in range(5)] == [""] * 5


def test_messages_need_a_template_and_one_that_takes_them(byte_tokenizer: Tokenizer) -> None:
    turns = [Message(role="user", content="hi")]
    with pytest.raises(UnsupportedRequest, match="no chat template"):
        byte_tokenizer.encode_chat(turns)

    strict = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer._tokenizer.backend_tokenizer)
    strict.chat_template = "{{ raise_exception('only system turns') }}"
    with pytest.raises(UnsupportedRequest, match="only system turns") as caught:
        Tokenizer(strict).encode_chat(turns)
    assert caught.value.param == "input.messages"
