"""The text of an answer while it grows: where it ends, and what may be shown already. Knows no model and no tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.request import FinishReason


class TextStream(Protocol):
    """Turns token ids into text, piece by piece; see ``core.tokenizer.Detokenizer``."""

    def push(self, token_id: int) -> str: ...


class NoText:
    """The stream of a model without a tokenizer."""

    def push(self, token_id: int) -> str:
        return ""


@dataclass(slots=True, eq=False)
class Answer:
    """What a job has said.

    Invariant: ``text`` is everything that was released, in order; ``held`` may turn out to be the beginning of a stop
    string. Nothing is released after ``finish_reason`` is set.
    """

    stream: TextStream
    stop: Sequence[str] = ()  #: the text ends before the first of these
    end_ids: Collection[int] = ()  #: token ids that end the answer and are not part of its text
    min_tokens: int = 0  #: stop strings are looked for in the text after so many tokens
    text: str = ""
    held: str = ""
    finish_reason: FinishReason | None = None
    _taken: int = field(init=False, default=0)  #: tokens
    _longest: int = field(init=False)

    def __post_init__(self) -> None:
        self._longest = max(map(len, self.stop), default=1) - 1  # characters that a later token can complete

    def push(self, token_id: int, *, last: bool) -> str:
        """Take one drawn token and return the text that is certain now.

        Args:
            last: no token may follow, so nothing is worth holding back.
        """
        self._taken += 1
        if token_id in self.end_ids:
            return self.finish("stop")
        self.held += self.stream.push(token_id)
        if self._taken <= self.min_tokens:
            return self.finish("length") if last else self._release(len(self.held))
        if (cut := self._first_stop()) is not None:
            self.held = self.held[:cut]
            return self.finish("stop")
        if last:
            return self.finish("length")
        return self._release(len(self.held) - self._undecided())

    def finish(self, reason: FinishReason) -> str:
        """End the answer here; returns the text that was held back."""
        self.finish_reason = reason
        return self._release(len(self.held))

    def _first_stop(self) -> int | None:
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        return min(found, default=None)

    def _undecided(self) -> int:
        """Length of the longest end of ``held`` that begins a stop string."""
        for length in range(min(self._longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-length:]) for stop in self.stop):
                return length
        return 0

    def _release(self, characters: int) -> str:
        piece, self.held = self.held[:characters], self.held[characters:]
        self.text += piece
        return piece
