"""Answers of a given form, by llguidance: grammars compiled beside the step, and which tokens may come next.

Knows no job's other parameters and no queue. Compiling runs in threads of its own, without the interpreter's lock,
within limits; a sequence's place in its grammar is used by the engine's thread alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from core.errors import GrammarRefused
from core.structured import Structured
from core.tokenizer import Tokenizer

COMPILE_SECONDS = 10.0
KEPT = 64  #: compiled grammars that are not in use
_THREADS = 2  #: so that one that takes long does not keep the others waiting
_MAX_GRAMMAR_SIZE = 200_000  #: symbols
_MAX_LEXER_STATES = 50_000  #: of 1 to 2 kB; the other limits of llguidance are its own


class Grammars:
    """Compiles what jobs ask for, and keeps the latest."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        end_ids: Collection[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokenizer = _read_tokenizer(tokenizer, vocab_size, end_ids)
        self._clock = clock
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._compilations: dict[Structured, _Compilation] = {}  # the latest asked for last
        self._waiting: dict[str, Structured] = {}

    @property
    def supported(self) -> bool:
        """llguidance can read the tokenizer, and there is a token to end with."""
        return self._tokenizer is not None

    @property
    def waiting(self) -> Collection[str]:
        """Jobs whose grammar nobody took yet."""
        return self._waiting

    def begin(self, job_id: str, asked: Structured) -> None:
        """Compile what a job asks for; ``ready`` names the job later."""
        compilation = self._compilations.pop(asked, None)
        if compilation is None:
            compilation = _Compilation()
            compilation.future = self._pool.submit(self._compile, asked, compilation)
        self._compilations[asked] = compilation
        self._waiting[job_id] = asked
        self._forget_old()

    def forget(self, job_id: str) -> bool:
        """The job waits no longer; whether it did."""
        return self._waiting.pop(job_id, None) is not None

    def ready(self, *, patience_seconds: float) -> list[tuple[str, LLMatcher | GrammarRefused]]:
        """Jobs that wait no longer than it takes to ``forget`` them, each with its grammar or why it has none.

        Args:
            patience_seconds: wait so long where there is none yet.
        """
        if not self._waiting:
            return []
        compilations = {asked: self._compilations[asked] for asked in self._waiting.values()}
        wait([each.future for each in compilations.values()], timeout=patience_seconds, return_when=FIRST_COMPLETED)
        outcomes = {asked: self._outcome(compilation) for asked, compilation in compilations.items()}
        for asked, outcome in outcomes.items():
            if isinstance(outcome, GrammarRefused) and compilations[asked].future.done():
                del self._compilations[asked]
        found = [(job_id, outcomes[asked]) for job_id, asked in self._waiting.items()]
        return [(job_id, outcome) for job_id, outcome in found if outcome is not None]

    def _outcome(self, compilation: _Compilation) -> LLMatcher | GrammarRefused | None:
        """None while it is being compiled."""
        if compilation.future.done():
            return compilation.future.result()
        began = compilation.began
        if began is not None and self._clock() - began > COMPILE_SECONDS:
            return GrammarRefused(f"takes longer than {COMPILE_SECONDS:g} s to compile")
        return None

    def _compile(self, asked: Structured, compilation: _Compilation) -> LLMatcher | GrammarRefused:
        """In a thread of the pool."""
        compilation.began = self._clock()
        assert self._tokenizer is not None
        try:
            matcher = LLMatcher(self._tokenizer, _to_lark(asked), log_level=0, limits=_limits())
        except ValueError as error:
            return GrammarRefused(_shorten(str(error)))
        return GrammarRefused(_shorten(matcher.get_error())) if matcher.is_error() else matcher

    def _forget_old(self) -> None:
        unused = [
            asked
            for asked, compilation in self._compilations.items()
            if compilation.future.done() and asked not in self._waiting.values()
        ]
        for asked in unused[: max(0, len(self._compilations) - KEPT)]:
            del self._compilations[asked]


@dataclass(slots=True, eq=False)
class _Compilation:
    """Of one grammar, for as many jobs as want it."""

    future: Future[LLMatcher | GrammarRefused] = field(init=False)
    began: float | None = None  #: None while others are before it


class Constraint:
    """One sequence's place in its grammar; it takes each drawn token once."""

    def __init__(self, grammar: LLMatcher) -> None:
        self._matcher = grammar.deep_copy()
        self._seen = 0

    def allow(self, drawn: Sequence[int], mask: Tensor) -> GrammarRefused | None:
        """Write down which tokens may follow.

        Args:
            drawn: the answer so far.
            mask: int32 [words], a bit a token; untouched where the grammar gives up.
        """
        words = torch.zeros_like(mask)
        if self._matcher.consume_tokens([*drawn[self._seen :]]):
            self._seen = len(drawn)
            self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
        if self._matcher.is_error() or not bool(words.any()):
            return GrammarRefused(f"gave up after {len(drawn)} tokens: {_shorten(self._matcher.get_error())}")
        mask.copy_(words)
        return None


def _read_tokenizer(tokenizer: Tokenizer | None, vocab_size: int, end_ids: Collection[int]) -> LLTokenizer | None:
    """Ours as llguidance knows it; None where it cannot know a token's bytes, or how to end."""
    ends = sorted(token_id for token_id in end_ids if token_id < vocab_size)
    if tokenizer is None or not ends:
        return None
    try:
        return from_tokenizer(tokenizer.of_transformers, n_vocab=vocab_size, eos_token=ends)
    except ValueError:
        return None


def _to_lark(asked: Structured) -> str:
    """llguidance's own form of it."""
    if asked.form == "json":
        return LLMatcher.grammar_from_json_schema(asked.text)
    if asked.form == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type":"object"}')
    if asked.form == "regex":
        return LLMatcher.grammar_from_regex(asked.text)
    if asked.form == "choice":
        choices = " | ".join(json.dumps(text) for text in json.loads(asked.text))
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    return LLMatcher.grammar_from_lark(asked.text)


def _limits() -> LLParserLimits:
    return LLParserLimits(max_grammar_size=_MAX_GRAMMAR_SIZE, max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)


def _shorten(text: str) -> str:
    return " ".join(text.split())[:200]
