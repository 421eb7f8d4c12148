"""What parameters do to logits before a token is drawn: bias, penalties, forbidden tokens. Tensors; knows no filter.

A sequence whose parameters ask for none of it has no ``Rules``, and its rows are not looked at. The others are changed
together, a handful of tensor operations a step, whose size is that of what is changed and not that of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.errors import GrammarRefused
from core.params import SamplingParams

if TYPE_CHECKING:
    from core.grammar import Constraint


class Tally:
    """Which tokens a sequence holds, and how often its answer does; it takes each token once."""

    def __init__(self, tokens: Sequence[int], prompt_tokens: int, *, prompt: bool) -> None:
        """
        Args:
            prompt: the prompt's tokens count as held.
        """
        held = dict.fromkeys(tokens[:prompt_tokens]) if prompt else {}
        self._places = {token_id: place for place, token_id in enumerate(held)}
        self._token_ids = torch.tensor([*self._places, *[0] * 64], dtype=torch.long)
        self._counts = torch.zeros(len(self._token_ids))
        self._seen = prompt_tokens

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Take what was drawn since the last time."""
        for token_id in tokens[self._seen :]:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._token_ids):
                self._token_ids = torch.cat([self._token_ids, torch.zeros_like(self._token_ids)])
                self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
            self._token_ids[place] = token_id
            self._counts[place] += 1
        self._seen = len(tokens)

    @property
    def token_ids(self) -> Tensor:
        """int64 [held]"""
        return self._token_ids[: len(self._places)]

    @property
    def counts(self) -> Tensor:
        """float32 [held]: how often each is in the answer."""
        return self._counts[: len(self._places)]


@dataclass(slots=True, eq=False)
class Rules:
    """What one sequence's parameters do to its logits, and what they have to remember for it.

    Nothing here follows a token as it is drawn: each step looks at the sequence's tokens, so what an earlier attempt
    has drawn counts like what this one has.
    """

    params: SamplingParams
    prompt_tokens: int
    early: tuple[int, ...] = ()  #: ids that end an answer, forbidden before it has ``min_tokens``
    bad_words: tuple[tuple[int, ...], ...] = ()  #: as token ids
    tally: Tally | None = field(init=False, default=None)
    constraint: Constraint | None = field(init=False, default=None)  #: of ``structured_outputs``, once it is compiled
    refusal: GrammarRefused | None = field(init=False, default=None)  #: why there is no next token
    bias: tuple[Tensor, Tensor] | None = field(init=False, default=None)  #: ids, and what is added
    _never: frozenset[int] = field(init=False)
    _longer: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        self._never = frozenset(word[0] for word in self.bad_words if len(word) == 1)
        self._longer = tuple(word for word in self.bad_words if len(word) > 1)
        if self.params.logit_bias:
            token_ids, values = zip(*self.params.logit_bias, strict=True)
            self.bias = torch.tensor(token_ids, dtype=torch.long), torch.tensor(values, dtype=torch.float32)

    @property
    def penalizes(self) -> bool:
        params = self.params
        return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)

    def count(self, tokens: Sequence[int]) -> Tally:
        """What the sequence holds now."""
        if self.tally is None:
            self.tally = Tally(tokens, self.prompt_tokens, prompt=self.params.repetition_penalty != 1)
        self.tally.catch_up(tokens)
        return self.tally

    def forbidden(self, tokens: Sequence[int]) -> Collection[int]:
        """Ids that must not come next."""
        drawn = len(tokens) - self.prompt_tokens
        ending = {
            word[-1]
            for word in self._longer
            if len(word) <= drawn + 1 and tuple(tokens[len(tokens) - len(word) + 1 :]) == word[:-1]
        }
        return self._never.union(ending, self.early if drawn < self.params.min_tokens else ())


@dataclass(frozen=True, slots=True)
class Ruled:
    """A row of the logits, its rules, and all tokens of its sequence."""

    row: int
    rules: Rules
    tokens: Sequence[int]


def rules_of(
    params: SamplingParams, prompt_tokens: int, end_ids: Collection[int], bad_words: Iterable[Sequence[int]]
) -> Rules | None:
    """The rules of a sequence; None where its logits stay as they are.

    Args:
        end_ids: that end an answer, stop tokens among them.
        bad_words: as token ids.
    """
    early = tuple(sorted(end_ids)) if params.min_tokens else ()
    rules = Rules(params, prompt_tokens, early, tuple(map(tuple, bad_words)))
    needed = rules.penalizes or rules.bias or rules.early or rules.bad_words or params.structured_outputs
    return rules if needed else None


def adjust(logits: Tensor, ruled: Sequence[Ruled]) -> None:
    """Change rows by their rules: the grammar, bias, repetition, frequency and presence penalty, what is forbidden.

    A row whose grammar gives up has a ``refusal`` then, and its logits mean nothing.

    Args:
        logits: float32 [rows, vocab]; changed in place.
    """
    _constrain(logits, ruled)
    _add_bias(logits, [one for one in ruled if one.rules.bias is not None])
    _penalize(logits, [one for one in ruled if one.rules.penalizes])
    _forbid(logits, [(one.row, ids) for one in ruled if (ids := sorted(one.rules.forbidden(one.tokens)))])


def _constrain(logits: Tensor, ruled: Sequence[Ruled]) -> None:
    constrained = [(one, one.rules.constraint) for one in ruled if one.rules.constraint is not None]
    if not constrained:
        return
    vocab = logits.shape[1]
    masks = torch.full((len(constrained), (vocab + 31) // 32), -1, dtype=torch.int32)
    for mask, (one, constraint) in zip(masks, constrained, strict=True):
        one.rules.refusal = constraint.allow(one.tokens[one.rules.prompt_tokens :], mask)
    rows = torch.tensor([one.row for one, _ in constrained], device=logits.device)
    allowed = _spread(masks.to(logits.device))[:, :vocab]
    logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))


def _spread(masks: Tensor) -> Tensor:
    """bool [rows, 32 * words] of int32 [rows, words]"""
    bits = (masks.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=masks.device)) & 1
    return bits.flatten(1).bool()


def _add_bias(logits: Tensor, ruled: Sequence[Ruled]) -> None:
    biases = [(one.row, one.rules.bias) for one in ruled if one.rules.bias is not None]
    if biases:
        rows = _repeat([row for row, _ in biases], [len(bias[0]) for _, bias in biases])
        token_ids, values = (torch.cat([bias[part] for _, bias in biases]).to(logits.device) for part in (0, 1))
        logits.index_put_((rows.to(logits.device), token_ids), values, accumulate=True)


def _penalize(logits: Tensor, ruled: Sequence[Ruled]) -> None:
    if not ruled:
        return
    tallies = [one.rules.count(one.tokens) for one in ruled]
    sizes, device = [len(tally.token_ids) for tally in tallies], logits.device
    token_ids = torch.cat([tally.token_ids for tally in tallies]).to(device)
    counts = torch.cat([tally.counts for tally in tallies]).to(device)
    rows = _repeat([one.row for one in ruled], sizes).to(device)
    repetition, frequency, presence = (
        _repeat([getattr(one.rules.params, f"{name}_penalty") for one in ruled], sizes).to(device)
        for name in ("repetition", "frequency", "presence")
    )
    values = logits[rows, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[rows, token_ids] = values - frequency * counts - presence * (counts > 0)


def _forbid(logits: Tensor, forbidden: Sequence[tuple[int, Sequence[int]]]) -> None:
    """A row of which nothing would be left stays as it is: something has to be drawn."""
    if not forbidden:
        return
    numbers = _repeat(list(range(len(forbidden))), [len(ids) for _, ids in forbidden]).to(logits.device)
    rows = torch.tensor([row for row, _ in forbidden], device=logits.device)
    places = rows[numbers], torch.tensor([token_id for _, ids in forbidden for token_id in ids], device=logits.device)
    before = logits[places]
    logits[places] = float("-inf")
    nothing_left = logits[rows].amax(-1) == float("-inf")
    logits[places] = torch.where(nothing_left[numbers], before, logits[places])


def _repeat(values: Sequence[float], times: Sequence[int]) -> Tensor:
    """Each value so many times; int64 or float32 [sum of times]."""
    return torch.repeat_interleave(torch.tensor(values), torch.tensor(times))
