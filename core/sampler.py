"""Logits → tokens, each row by its own parameters and its own randomness. Knows no sequence and no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.kernels.rows import argmax
from core.largest import reach
from core.logits import Ruled, Rules, adjust
from core.request import SamplingParams, TokenLogprob

LIKELIEST = 1024  #: candidates looked at before a whole vocabulary is
_TOGETHER = 32  #: rows of log-probabilities in memory at once
_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's token is drawn."""

    params: SamplingParams
    seed: int
    position: int  #: of the token in its answer
    choice: int = 0
    rules: Rules | None = None  #: what its parameters do to the logits first; None: nothing
    known: int | None = None  #: the token, where it is not drawn and only its log-probability is wanted
    tokens: Sequence[int] = ()  #: prompt and answer so far, for the rules

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

    Rules come first, then temperature, then top-k, then top-p of what is left, then min-p. Log-probabilities are of the
    logits as they came.

    Args:
        logits: float32 [rows, vocab], as the model gave them; not changed.
        draws: one a row.
    """
    drawn: list[int] = _draw(_ruled(logits, draws), draws).tolist()
    ids = [token_id if how.known is None else how.known for token_id, how in zip(drawn, draws, strict=True)]
    logprobs = _logprobs(logits, ids, {row: how.params.logprobs for row, how in enumerate(draws)})
    return [Drawn(token_id, logprobs.get(row)) for row, token_id in enumerate(ids)]


def _ruled(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits themselves where no row has a rule, else changed ones."""
    ruled = [Ruled(row, how.rules, how.tokens) for row, how in enumerate(draws) if how.rules is not None]
    if not ruled:
        return logits
    logits = logits.clone()
    adjust(logits, ruled)
    return logits


def _draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """int64 [rows]"""
    token_ids = argmax(logits)
    sampled = [row for row, how in enumerate(draws) if how.params.temperature > 0]
    filtered = [row for row in sampled if _filters(draws[row].params)]
    plain = [row for row in sampled if not _filters(draws[row].params)]
    if plain:
        token_ids[plain] = _draw_plain(logits[plain], [draws[row] for row in plain])
    if filtered:
        token_ids[filtered] = _draw_filtered(logits[filtered], [draws[row] for row in filtered])
    return token_ids


@dataclass(frozen=True, slots=True)
class Kept:
    """What the filters leave of each row's candidates, likeliest first; of equally likely ones the lower id."""

    token_ids: Tensor  #: int64 [rows, candidates]
    weights: Tensor  #: float32 [rows, candidates]; 0 where filtered out
    decided: Tensor  #: bool [rows]: nothing outside the candidates is kept


def keep(logits: Tensor, draws: Sequence[Draw], candidates: int) -> Kept:
    """Apply temperature, top-k, top-p and min-p, looking only at each row's likeliest ``candidates``.

    Args:
        logits: float32 [rows, vocab].
        draws: one a row.
    """
    vocab = logits.shape[1]
    whole, top_k, top_p, min_p = _scale(logits, draws)
    weights, token_ids = _likeliest(whole, min(candidates, vocab))
    last = weights[:, -1:].clone()
    weights = weights.masked_fill(torch.arange(weights.shape[1], device=logits.device) >= top_k, 0.0)
    few = top_k <= weights.shape[1]
    total = torch.where(few, _sum(weights), _sum(whole))
    reached = weights.cumsum(-1, dtype=torch.float64)
    kept = ((reached - weights < top_p * total) | (top_p >= 1)) & (weights >= min_p) & (weights > 0)
    kept[:, 0] = True
    weights = weights.masked_fill(~kept, 0.0)
    least = weights.masked_fill(~kept, 2.0).amin(-1, keepdim=True)
    known = few | (top_k >= vocab) | (top_p >= 1)  # else the sum that top-p is a share of is not
    decided = known & (least > last)  # those that are as likely as the last one may not all be candidates
    return Kept(token_ids, weights, decided.squeeze(1) | (weights.shape[1] == vocab))


def keep_of_all(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The same of the whole vocabulary, which is not sorted for it.

    Returns:
        float32 [rows, vocab], the weights by token id; 0 where filtered out.
    """
    rows = zip(logits.split(1), draws, strict=True)  # one row stays in the cache; all of them take three times as long
    return torch.cat([_keep_of_row(row, how) for row, how in rows])


def _keep_of_row(logits: Tensor, how: Draw) -> Tensor:
    """float32 [1, vocab]"""
    weights, top_k, top_p, min_p = _scale(logits, [how])
    some = weights >= min_p
    if 0 < how.params.top_k < logits.shape[1]:
        counted = reach(weights, torch.ones_like(weights, dtype=torch.float64), top_k.double())
        some &= counted
        weights = weights.masked_fill(~counted, 0.0)
    if how.params.top_p < 1:
        mass = weights.double()
        some &= reach(weights, mass, top_p * _sum(mass))
    return weights.masked_fill(~some, 0.0)


def _scale(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights by token id, of which the likeliest has 1; and top-k, top-p, min-p, a column each."""
    vocab = logits.shape[1]
    scaled = logits / _column(logits, [how.params.temperature for how in draws])
    weights = torch.exp(scaled - scaled.amax(-1, keepdim=True))
    top_k = _column(logits, [min(how.params.top_k or vocab, vocab) for how in draws])
    top_p = _column(logits, [how.params.top_p for how in draws], torch.float64)
    min_p = _column(logits, [how.params.min_p for how in draws])
    return weights, top_k, top_p, min_p


def _sum(weights: Tensor) -> Tensor:
    return weights.sum(-1, keepdim=True, dtype=torch.float64)


def _likeliest(weights: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """The largest weights and their ids; equal ones in the order of their ids, whatever ``topk`` makes of them."""
    values, token_ids = torch.topk(weights, candidates, dim=-1, sorted=False)
    token_ids, order = torch.sort(token_ids, dim=-1)
    values, order = torch.sort(values.gather(1, order), dim=-1, descending=True, stable=True)
    return values, token_ids.gather(1, order)


def _draw_plain(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    probabilities = torch.softmax(logits / _column(logits, [how.params.temperature for how in draws]), dim=-1)
    return _invert(probabilities, draws)


def _draw_filtered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Few rows need more than their likeliest tokens."""
    kept = keep(logits, draws, LIKELIEST)
    token_ids = _pick(kept, draws)
    rows = (~kept.decided).nonzero().flatten().tolist()
    if rows:
        again = [draws[row] for row in rows]
        token_ids[rows] = _invert(keep_of_all(logits[rows], again), again)
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


def _logprobs(logits: Tensor, ids: Sequence[int], likeliest: Mapping[int, int | None]) -> dict[int, TokenLogprob]:
    """Of each row that wants them, by row.

    Args:
        likeliest: row to how many likeliest tokens; None wants nothing.
    """
    wanted = [(row, count) for row, count in likeliest.items() if count is not None]
    found: dict[int, TokenLogprob] = {}
    for start in range(0, len(wanted), _TOGETHER):
        part = wanted[start : start + _TOGETHER]
        rows = [row for row, _ in part]
        logprobs = torch.log_softmax(logits[rows], dim=-1)
        own = logprobs.gather(1, torch.tensor([[ids[row]] for row in rows], device=logits.device)).flatten().tolist()
        most = min(max(count for _, count in part), logits.shape[1])
        values, token_ids = (each.tolist() for each in torch.topk(logprobs, most))
        for place, (row, count) in enumerate(part):
            top = tuple(zip(token_ids[place][:count], values[place][:count], strict=True))
            found[row] = TokenLogprob(token_id=ids[row], logprob=own[place], top=top)
    return found


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype).unsqueeze(1).to(like.device)


def _mix(word: int) -> int:
    """splitmix64: one 64-bit word in, a well mixed one out."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)
