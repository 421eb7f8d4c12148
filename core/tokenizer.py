"""Text → token ids and back, by the model's own tokenizer and chat template. Knows no job and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from core.errors import UnsupportedRequest
from core.request import Message

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")

_HALF = "\N{REPLACEMENT CHARACTER}"  #: what decoding makes of bytes that are no whole character (yet)
_WINDOW = 24  #: tokens decoded anew with each push, before the oldest are let go
_CONTEXT = 6  #: tokens kept when they are let go: how the next piece is spaced depends on the ones before it
_GARBAGE = 64  #: a window with so many tokens that do not end in a whole character will not become one


class Tokenizer:
    """A model's tokenizer."""

    def __init__(self, transformers_tokenizer: Any) -> None:
        self._tokenizer = transformers_tokenizer

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The folder's tokenizer; None if it holds none."""
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return None
        return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))

    @property
    def of_transformers(self) -> Any:
        """As Transformers has it."""
        return self._tokenizer

    @property
    def chat(self) -> bool:
        """Has a template for messages."""
        return bool(self._tokenizer.chat_template)

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a text, or a turn."""
        found = self._tokenizer.eos_token_id
        return frozenset() if found is None else frozenset({int(found)})

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw text, with the special tokens this tokenizer adds by itself."""
        return list(self._tokenizer(text)["input_ids"])

    def encode_words(self, words: Iterable[str]) -> list[list[int]]:
        """Token ids of words as they begin a text and, where that is another token, as they follow a space."""
        found: list[list[int]] = []
        for word in words:
            first, inside = (self._encode_plain(space + word.lstrip()) for space in ("", " "))
            found += [first] if first else []
            found += [inside] if first and len(inside) == len(first) and inside[0] != first[0] else []
        return found

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to where the model's turn begins.

        Raises:
            UnsupportedRequest: there is no template, or it refuses these messages.
        """
        if not self.chat:
            raise UnsupportedRequest("input.messages", "this model has no chat template; send input.prompt")
        turns = [message.to_wire() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise UnsupportedRequest("input.messages", f"the model's chat template refuses them: {error}") from error
        return self._encode_plain(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special tokens have none."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stream(self) -> Detokenizer:
        """A fresh stream of one answer."""
        return Detokenizer(self.decode)


class Detokenizer:
    """Turns an answer's token ids into text, piece by piece.

    The joined pieces are the decoded text, but for an unfinished character at its very end: half a character is never
    emitted. Decoding all tokens each time would take quadratic time, so only a window of the latest is decoded.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._emitted = 0  #: leading characters of the window's text that are out already

    def push(self, token_id: int) -> str:
        """Take the next token, and return the text that it completes."""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(_HALF)
        if whole != text and len(self._window) > _GARBAGE:
            whole = text[: max(len(whole), len(text) - 3)]  # at most three bytes wait for a fourth
        piece = whole[self._emitted :]
        self._emitted = max(self._emitted, len(whole))
        if len(self._window) > _WINDOW and whole == text:
            self._window = self._window[-_CONTEXT:]
            self._emitted = len(self._decode(self._window))
        return piece
