"""One choice of a job while it is computed: tokens, and how far the model has got. Knows no tensor."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.answer import Answer
from core.blocks import BLOCK_TOKENS, next_digest, root_digest
from core.request import Choice, Emitted, FinishReason, Kind, Request, TokenLogprob

if TYPE_CHECKING:
    from core.logits import Rules


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, and how far the model has got through them.

    Invariant: ``0 <= computed <= len(tokens) <= most_tokens``. ``pending`` tokens still have to pass through the
    model: many right after arrival, one per step while decoding.
    """

    job_id: str
    request: Request
    tokens: list[int]  #: prompt first, then everything drawn
    prompt_tokens: int
    most_tokens: int  #: prompt and answer together never grow past this
    seed: int
    answer: Answer  #: the text so far, and when it ends
    index: int = 0  #: which of its job's choices it is
    rules: Rules | None = None  #: what its parameters do to its logits; None: nothing
    logprobs: list[TokenLogprob] = field(default_factory=list)  #: of the drawn tokens, where the request wants them
    predicted: list[int] = field(default_factory=list)  #: PREDICT: the likeliest next id of each computed position
    leader: Sequence | None = None  #: another choice of the job, whose prompt it shares
    scored: list[TokenLogprob] | None = None  #: of the prompt's tokens from the second on; None: not wanted
    computed: int = 0  #: leading tokens whose keys and values are in the cache
    cached: int | None = None  #: of them, how many were there when it was first admitted
    blocks: list[int] = field(default_factory=list)  #: of the cache, in the order of its tokens
    running: bool = False  #: admitted: it may have blocks
    _digests: list[bytes] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens the model has not seen yet."""
        return len(self.tokens) - self.computed

    @property
    def reusable(self) -> int:
        """Leading tokens that need not pass through the model where their keys are known: what follows needs one."""
        return 0 if self.predicts or self.wants_prompt_logits else len(self.tokens) - 1

    def digests(self, blocks: int) -> list[bytes]:
        """Of its first full blocks; see ``core.blocks``."""
        for number in range(len(self._digests), blocks):
            before = self._digests[-1] if number else root_digest(self.request.cache_salt)
            first = number * BLOCK_TOKENS
            self._digests.append(next_digest(before, self.tokens[first : first + BLOCK_TOKENS]))
        return self._digests[:blocks]

    @property
    def drawn(self) -> list[int]:
        """The answer's token ids."""
        return self.tokens[self.prompt_tokens :]

    @property
    def predicts(self) -> bool:
        """Wants the likeliest id at each of its positions, and no answer."""
        return self.request.kind is Kind.PREDICT

    @property
    def ended(self) -> bool:
        """Nothing is left to compute."""
        return self.answer.finish_reason is not None and not self.wants_prompt_logits

    @property
    def wants_prompt_logits(self) -> bool:
        """Its prompt has to pass through the model token by token, whatever is known of its keys already."""
        return self.scored is not None and len(self.scored) < self.prompt_tokens - 1

    def accept(self, token_id: int, logprob: TokenLogprob | None = None) -> str:
        """Append a drawn token and return the text it releases; may set the answer's ``finish_reason``."""
        self.tokens.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        return self.answer.push(token_id, last=len(self.tokens) >= self.most_tokens)

    def resume(self, emitted: Emitted) -> None:
        """Go to where an earlier attempt left it: that text was published already."""
        for number, token_id in enumerate(emitted.token_ids):
            if self.answer.finish_reason is None:
                self.accept(token_id, emitted.logprobs[number] if emitted.logprobs else None)

    def accept_predicted(self, begin: int, token_ids: Many[int]) -> None:
        """Note the likeliest ids of the positions just computed, perhaps anew."""
        self.predicted[begin:] = token_ids
        if len(self.predicted) == self.prompt_tokens:
            self.answer.finish_reason = "stop"

    def score_prompt(self, begin: int, logprobs: Many[TokenLogprob | None]) -> None:
        """Note what positions from ``begin`` on say of the tokens after them; those of the answer do not count."""
        for position, logprob in enumerate(logprobs, begin):
            if self.scored is not None and self.wants_prompt_logits and position == len(self.scored):
                assert logprob is not None
                self.scored.append(logprob)

    def end(self, reason: FinishReason) -> None:
        """End here, unless it has ended: what is held back was never certain, nor shown."""
        if not self.ended:
            self.answer.finish_reason = self.answer.finish_reason or reason
            self.scored = None if self.wants_prompt_logits else self.scored

    def choice(self) -> Choice:
        """What is stored at the end; the sequence has ended."""
        assert self.answer.finish_reason is not None
        return Choice(
            index=self.index,
            text=self.answer.text,
            finish_reason=self.answer.finish_reason,
            token_ids=tuple(self.drawn),
            logprobs=None if self.request.params.logprobs is None else tuple(self.logprobs),
        )
