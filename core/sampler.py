"""Logits → tokens, each row by its own parameters and its own randomness. Knows no sequence and no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.request import SamplingParams, TokenLogprob

LIKELIEST = 1024  #: candidates looked at before a whole vocabulary is sorted
_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's token is drawn."""

    params: SamplingParams
    seed: int
    position: int  #: of the token in its answer
    choice: int = 0

    @property
    def uniform(self) -> float:
        """The row's randomness: above 0 and below 1, a function of seed, choice and position alone."""
        word = _mix(_mix(_mix(self.seed & _MASK) ^ self.choice) ^ self.position)
        return ((word >> 11) + 0.5) / 2**53


@dataclass(frozen=True, slots=True)
class Drawn:
    """One row's token."""

    token_id: int
    logprob: TokenLogprob | None


GREEDY = Draw(SamplingParams(), 0, 0)


def draw(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw one token per row.

    Temperature comes first, then top-k, then top-p of what is left, then min-p.

    Args:
        logits: float32 [rows, vocab], as the model gave them.
        draws: one a row.
    """
    token_ids = torch.argmax(logits, dim=-1)
    sampled = [row for row, how in enumerate(draws) if how.params.temperature > 0]
    filtered = [row for row in sampled if _filters(draws[row].params)]
    plain = [row for row in sampled if not _filters(draws[row].params)]
    if plain:
        token_ids[plain] = _draw_plain(logits[plain], [draws[row] for row in plain])
    if filtered:
        token_ids[filtered] = _draw_filtered(logits[filtered], [draws[row] for row in filtered])
    ids: list[int] = token_ids.tolist()
    return [
        Drawn(ids[row], None if how.params.logprobs is None else _logprob(logits[row], ids[row], how.params.logprobs))
        for row, how in enumerate(draws)
    ]


@dataclass(frozen=True, slots=True)
class Kept:
    """What the filters leave of each row, likeliest first."""

    token_ids: Tensor  #: int64 [rows, candidates]
    weights: Tensor  #: float32 [rows, candidates]; 0 where filtered out
    decided: Tensor  #: bool [rows]: nothing outside the candidates could have been kept


def keep(logits: Tensor, draws: Sequence[Draw], candidates: int) -> Kept:
    """Apply temperature, top-k, top-p and min-p, looking only at each row's likeliest ``candidates``.

    Args:
        logits: float32 [rows, vocab].
        draws: one a row.
    """
    vocab = logits.shape[1]
    scaled = logits / _column(logits, [how.params.temperature for how in draws])
    top_k = _column(logits, [min(how.params.top_k or vocab, vocab) for how in draws])
    top_p = _column(logits, [how.params.top_p for how in draws])
    min_p = _column(logits, [how.params.min_p for how in draws])
    values, token_ids = torch.topk(scaled, min(candidates, vocab), dim=-1)
    weights = torch.exp(values - values[:, :1])  # of the likeliest: 1, so that min-p compares with them
    weights = weights.masked_fill(torch.arange(weights.shape[1], device=logits.device) >= top_k, 0.0)
    whole = torch.exp(torch.logsumexp(scaled, -1, keepdim=True) - values[:, :1])
    total = torch.where(top_k <= weights.shape[1], weights.sum(-1, keepdim=True), whole)
    reached = weights.cumsum(-1)
    kept = ((reached - weights < top_p * total) | (top_p >= 1)) & (weights >= min_p)
    kept[:, 0] = True
    last = weights.shape[1] - 1
    past = (top_k <= last + 1) | ((reached[:, -1:] >= top_p * total) & (top_p < 1)) | (weights[:, -1:] < min_p)
    known = (top_k <= last + 1) | (top_k >= vocab) | (top_p >= 1)  # else the sum that top-p is a share of is not
    decided = (past & known).squeeze(1) | (last + 1 == vocab)
    return Kept(token_ids, weights.masked_fill(~kept, 0.0), decided)


def _draw_plain(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    probabilities = torch.softmax(logits / _column(logits, [how.params.temperature for how in draws]), dim=-1)
    return _invert(probabilities, draws)


def _draw_filtered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A full sort of the vocabulary costs a step and a half; few rows need one."""
    kept = keep(logits, draws, LIKELIEST)
    token_ids = _pick(kept, draws)
    rows = (~kept.decided).nonzero().flatten().tolist()
    if rows:
        again = [draws[row] for row in rows]
        token_ids[rows] = _pick(keep(logits[rows], again, logits.shape[1]), again)
    return token_ids


def _pick(kept: Kept, draws: Sequence[Draw]) -> Tensor:
    return kept.token_ids.gather(1, _invert(kept.weights, draws).unsqueeze(1)).squeeze(1)


def _invert(weights: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The place in each row where the cumulative weight passes the row's uniform share of the whole; int64 [rows]."""
    reached = weights.cumsum(-1)
    whole = reached[:, -1:].contiguous()
    share = _column(weights, [how.uniform for how in draws]) * whole
    place = torch.searchsorted(reached, share, right=True)
    return torch.minimum(place, torch.searchsorted(reached, whole)).squeeze(1)  # never past the last weight above 0


def _logprob(logits: Tensor, token_id: int, likeliest: int) -> TokenLogprob:
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, min(likeliest, logprobs.shape[0]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id=token_id, logprob=float(logprobs[token_id]), top=top)


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1).to(like.device)


def _mix(word: int) -> int:
    """splitmix64: one 64-bit word in, a well mixed one out."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)
