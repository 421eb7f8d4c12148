"""Tokens are drawn from exactly the distribution the parameters describe, each row on its own."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.request import SamplingParams
from core.sampler import Draw, draw, keep, keep_of_all

PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=1.3, top_p=0.7),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=0.8, top_k=8, top_p=0.8, min_p=0.05),
]


def oracle(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The kept tokens and their probabilities, the slow way."""
    weights = [math.exp(logit / params.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])
    if params.top_k:
        order = order[: params.top_k]
    total, reached, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if params.top_p < 1 and reached >= params.top_p * total:
            break
        reached += weights[token]
        kept.append(token)
    kept = [token for token in kept if weights[token] >= params.min_p * weights[order[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize("params", PARAMS)
def test_many_draws_have_the_filtered_distribution(params: SamplingParams) -> None:
    torch.manual_seed(3)
    logits, count = torch.randn(1, 12) * 1.5, 6000
    expected = oracle(logits[0].tolist(), params)

    drawn = draw(logits.expand(count, -1), [Draw(params, seed=1, position=position) for position in range(count)])

    seen = [token.token_id for token in drawn]
    assert set(seen) <= set(expected)
    for token, probability in expected.items():
        spread = math.sqrt(probability * (1 - probability) / count)
        assert abs(seen.count(token) / count - probability) < 5 * spread + 1e-9


def kept_the_slow_way(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """Sort everything, then take one token after the other: of equally likely ones the lower id first."""
    scaled = logits / params.temperature
    weights: list[float] = torch.exp(scaled - scaled.max()).tolist()
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = order[: params.top_k or len(order)]
    total, reached, kept = sum(weights[token] for token in order), 0.0, set()
    for token in order:
        if params.top_p == 1 or reached < params.top_p * total:
            kept.add(token)
        reached += weights[token]
    return {token for token in kept if weights[token] >= float(np.float32(params.min_p)) and weights[token] > 0}


@st.composite
def filtered(draw_from: st.DrawFn) -> tuple[torch.Tensor, list[SamplingParams]]:
    """Rows, flat and steep, with many equal logits among them, and a filter for each."""
    rows, vocab = draw_from(st.integers(1, 4)), draw_from(st.sampled_from([1, 2, 40, 300]))
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 2**32)))
    logits = torch.randn(rows, vocab, generator=generator) * draw_from(st.sampled_from([0.0, 0.05, 1.0, 4.0, 30.0]))
    if draw_from(st.booleans()):
        logits = (logits * 4).round() / 4
    if draw_from(st.booleans()):
        logits[:, 1::3] = float("-inf")
    params = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 5, 50, 299, 300, 1000]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6])
        | st.floats(1e-3, 0.999999),  # nearer to 1 the order of a float64 sum decides
        min_p=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    )
    return logits, draw_from(st.lists(params, min_size=rows, max_size=rows))


@settings(max_examples=400, deadline=None)
@given(filtered(), st.sampled_from([1, 8, 64, 300]))
def test_the_kept_set_is_that_of_a_full_sort_wherever_it_is_looked_for(
    drawn: tuple[torch.Tensor, list[SamplingParams]], candidates: int
) -> None:
    logits, how = drawn
    draws = [Draw(params, 0, 0) for params in how]
    kept, of_all = keep(logits, draws, candidates), keep_of_all(logits, draws)

    for row, params in enumerate(how):
        expected = kept_the_slow_way(logits[row], params)
        found = {int(token) for token, weight in zip(kept.token_ids[row], kept.weights[row], strict=True) if weight > 0}
        assert set(of_all[row].nonzero().flatten().tolist()) == expected
        if kept.decided[row]:
            assert found == expected
        assert kept.decided[row] or candidates < logits.shape[1]


def test_equal_weights_are_kept_in_the_order_of_their_ids() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.5)

    assert keep_of_all(torch.zeros(1, 5000), [Draw(params, 0, 0)])[0].nonzero().flatten().tolist() == [*range(2500)]


def test_a_few_likely_tokens_are_decided_without_the_whole_vocabulary() -> None:
    logits = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(1)) * 4
    how = [SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=1.0, top_k=50, min_p=0.01)] * 4

    assert keep(logits, [Draw(params, 0, 0) for params in how], 1024).decided.all()


def test_no_row_sorts_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    topk, sort = torch.topk, torch.sort

    def watched_topk(x: torch.Tensor, k: int, **more: Any) -> Any:
        sizes.append(k)
        return topk(x, k, **more)

    def watched_sort(x: torch.Tensor, **more: Any) -> Any:
        sizes.append(x.shape[-1])
        return sort(x, **more)

    monkeypatch.setattr(torch, "topk", watched_topk)
    monkeypatch.setattr(torch, "sort", watched_sort)

    draw(torch.zeros(2, 9000), [Draw(SamplingParams(temperature=1.0, top_p=0.99), 9, 0)] * 2)

    assert max(sizes) == 1024


def test_a_wide_distribution_draws_beyond_the_first_candidates() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.99)
    drawn = draw(torch.zeros(400, 5000), [Draw(params, 9, position) for position in range(400)])

    assert len({token.token_id for token in drawn}) > 350


def test_rows_that_want_different_numbers_of_log_probabilities_each_have_theirs() -> None:
    logits, counts = torch.randn(40, 50), [None, 0, 3, 60] * 10
    drawn = draw(logits, [Draw(SamplingParams(logprobs=count and min(count, 20)), 1, 0) for count in counts])
    expected = torch.log_softmax(logits, -1)

    for row, (token, count) in enumerate(zip(drawn, counts, strict=True)):
        if count is None:
            assert token.logprob is None
            continue
        assert token.logprob is not None
        assert len(token.logprob.top) == min(count, 20)
        assert token.logprob.logprob == pytest.approx(float(expected[row].max()), abs=1e-5)
        assert [value for _, value in token.logprob.top] == sorted(expected[row].tolist(), reverse=True)[
            : min(count, 20)
        ]


def test_temperature_zero_takes_the_likeliest_whatever_the_filters() -> None:
    logits = torch.randn(4, 50)
    params = SamplingParams(temperature=0, top_p=0.1, top_k=7, min_p=0.5, seed=1)

    assert [token.token_id for token in draw(logits, [Draw(params, 1, 0)] * 4)] == logits.argmax(-1).tolist()


def test_a_rows_token_does_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(0)
    logits, shuffle = torch.randn(40, 3000), random.Random(0)
    draws = [Draw(shuffle.choice(PARAMS), seed=row, position=row) for row in range(40)]
    alone = [draw(logits[row : row + 1], [draws[row]])[0].token_id for row in range(40)]
    order = shuffle.sample(range(40), 40)

    together = draw(logits[order], [draws[row] for row in order])

    assert [token.token_id for token in together] == [alone[row] for row in order]


def test_the_uniform_is_uniform_and_changes_with_seed_choice_and_position() -> None:
    params = SamplingParams(temperature=1.0)
    numbers = [Draw(params, seed, position).uniform for seed in range(100) for position in range(100)]

    assert len(set(numbers)) == len(numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.01
    counts = [sum(tenth / 10 <= number < (tenth + 1) / 10 for number in numbers) for tenth in range(10)]
    assert all(900 < count < 1100 for count in counts)
    assert Draw(params, 1, 2, choice=1).uniform != Draw(params, 1, 2).uniform
    assert Draw(params, 2**63 - 1, 0).uniform < 1


def test_the_uniform_is_the_same_in_every_version() -> None:
    assert Draw(SamplingParams(), 42, 7).uniform == pytest.approx(UNIFORM_42_7, abs=1e-15)


#: Written down once: a change here changes what running jobs say after an upgrade.
UNIFORM_42_7 = 0.6424233675512125
