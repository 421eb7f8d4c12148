"""From a request to the sequences to compute: its tokens, its limits, one sequence a choice. Knows no tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from collections.abc import Sequence as Many
from typing import TypeAlias

from core.answer import Answer, NoText
from core.card import ModelCard
from core.choices import Choices
from core.errors import InvalidField, PromptTooLong, UnsupportedRequest
from core.logits import rules_of
from core.request import Emitted, Kind, Request, SamplingParams
from core.sequence import Sequence
from core.tokenizer import Tokenizer

Words: TypeAlias = Many[Many[int]]  #: each as its token ids


class Reader:
    """Reads requests for one model."""

    def __init__(self, tokenizer: Tokenizer | None, end_ids: Collection[int], card: ModelCard) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._card = card

    def read(self, job_id: str, request: Request, emitted: tuple[Emitted, ...]) -> Choices[Sequence]:
        """The job as it stood after ``emitted``.

        Raises:
            RequestError: too long, unsupported, ids outside the vocabulary …
        """
        self._card.refuse(request)
        tokens = self._read_prompt(request)
        bad_words = self._read_bad_words(request.params)
        count = 1 if request.kind is Kind.PREDICT else request.params.n
        sequences = tuple(self._begin(job_id, request, tokens, index, bad_words) for index in range(count))
        for sequence in sequences[1:]:
            sequence.leader = sequences[0]
        if request.kind is not Kind.PREDICT:
            for sequence, published in zip(sequences, emitted, strict=False):
                sequence.resume(published)
        return Choices(job_id, request, len(tokens), sequences)

    def _begin(self, job_id: str, request: Request, tokens: list[int], index: int, bad_words: Words) -> Sequence:
        """A choice of which nothing is drawn."""
        params = request.params
        endless = params.ignore_eos and params.structured_outputs is None
        end_ids = frozenset(() if endless else self._end_ids).union(params.stop_token_ids)
        wants_scores = params.prompt_logprobs is not None and index == 0 and request.kind is Kind.GENERATE
        answer_tokens = 0 if request.kind is Kind.PREDICT else params.max_tokens
        return Sequence(
            job_id=job_id,
            request=request,
            tokens=list(tokens),
            prompt_tokens=len(tokens),
            most_tokens=min(len(tokens) + answer_tokens, self._card.max_model_len),
            seed=_seed(job_id) if params.seed is None else params.seed,
            answer=Answer(
                stream=NoText() if self._tokenizer is None else self._tokenizer.stream(),
                stop=params.stop,
                end_ids=end_ids,
                min_tokens=params.min_tokens,
            ),
            index=index,
            scored=[] if wants_scores else None,
            rules=rules_of(params, len(tokens), end_ids, bad_words),
        )

    def _read_bad_words(self, params: SamplingParams) -> Words:
        """Their token ids; and ids that a parameter names are in the vocabulary."""
        named = {"stop_token_ids": params.stop_token_ids, "logit_bias": [token_id for token_id, _ in params.logit_bias]}
        for name, token_ids in named.items():
            if max(token_ids, default=0) >= self._card.vocab_size:
                vocabulary = f"{self._card.vocab_size}, this model's vocabulary"
                raise InvalidField(f"params.{name}", f"must hold token ids below {vocabulary}")
        if params.bad_words and self._tokenizer is None:
            raise UnsupportedRequest("params.bad_words", "this model has no tokenizer")
        return self._tokenizer.encode_words(params.bad_words) if self._tokenizer and params.bad_words else ()

    def _read_prompt(self, request: Request) -> list[int]:
        """The prompt's token ids, of which the model takes so many and such."""
        tokens, param = self._read_input(request)
        limit = self._card.max_model_len
        if not tokens:
            raise InvalidField(param, "has no token")
        if max(tokens) >= self._card.vocab_size:
            raise InvalidField(param, f"must hold token ids below {self._card.vocab_size}, this model's vocabulary")
        new = 0 if request.kind is Kind.PREDICT else 1
        if len(tokens) + new > limit:
            raise PromptTooLong(len(tokens), limit - new, param)
        return tokens

    def _read_input(self, request: Request) -> tuple[list[int], str]:
        """Token ids, and the field they come from."""
        if request.token_ids is not None:
            param = "input.token_ids" if request.kind is Kind.PREDICT else "input.prompt_token_ids"
            return list(request.token_ids), param
        param = "input.messages" if request.prompt is None else "input.prompt"
        if self._tokenizer is None:
            raise UnsupportedRequest(param, "this model has no tokenizer; send input.prompt_token_ids")
        if request.prompt is not None:
            return self._tokenizer.encode(request.prompt), param
        return self._tokenizer.encode_chat(request.messages or ()), param


def _seed(job_id: str) -> int:
    """A seed for a job that names none: the same for every attempt."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8], "big")
