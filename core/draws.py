"""A step's rows of logits → how each becomes a token. Knows parameters and positions; computes nothing."""

from __future__ import annotations

from core.batch import Batch
from core.request import SamplingParams
from core.sampler import GREEDY, Draw
from core.scheduler import Step
from core.sequence import Sequence


def draws_of(step: Step, batch: Batch) -> list[Draw]:
    """How each row of the logits becomes a token."""
    draws: list[Draw] = []
    for piece, count in zip(step.slices, batch.row_counts, strict=True):
        sequence = piece.sequence
        if sequence.predicts:
            draws += [GREEDY] * count
            continue
        if sequence.wants_prompt_logits:
            draws += _scores(sequence, piece.begin, count - piece.completes)
        if piece.completes:
            position = len(sequence.tokens) - sequence.prompt_tokens
            params, tokens = sequence.request.params, sequence.tokens
            draws.append(Draw(params, sequence.seed, position, sequence.index, sequence.rules, tokens=tokens))
    return draws


def _scores(sequence: Sequence, begin: int, count: int) -> list[Draw]:
    """Rows of which only the log-probability of the token that follows is wanted."""
    params = SamplingParams(logprobs=sequence.request.params.prompt_logprobs)
    following = sequence.tokens[begin + 1 : begin + 1 + count]
    return [Draw(params, 0, 0, known=token_id) for token_id in following]
