"""Does our attention compute what the model's own does, and do our kernels? Asked once, at load. Knows no job."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from typing import Any

import torch
from torch import Tensor

from core.answer import Answer, NoText
from core.attention import NAME, KVCache, Pass
from core.batch import build_batch
from core.blocks import blocks_of
from core.errors import EngineError, ModelRefused
from core.fused import fuse
from core.replay import chain
from core.request import Request
from core.scheduler import Slice, Step
from core.sequence import Sequence

_log = logging.getLogger(__name__)

TOLERANCE = 1e-3  #: the largest difference of two logits that rounding explains
#: A difference is measured again before a model is refused: once in some two hundred starts on a busy virtual machine
#: the two passes differed for a reason that did not come back. What is wrong in the code is wrong each time.
_TRIES = 2
_TEXT = 40  #: tokens, where the model has no window
_COMPARED = 8  #: tokens at each slice's end: a long text times a large vocabulary would fill the memory
#: Of the largest logit: what rounding to bfloat16 or int8 on the way explains. What computes something else is at 1.
_ROUNDING = 0.25


@torch.inference_mode()
def check_attention(model: Any, name: str, max_model_len: int) -> KVCache:
    """Run the model through its own attention and through ours; leaves ours set.

    Two texts share the passes, in slices and in single tokens, the longer one past any window that ``max_model_len``
    lets a text reach.

    Args:
        model: a Transformers decoder in float32.

    Returns:
        The cache that was filled: it knows what a token costs.

    Raises:
        ModelRefused: more than TOLERANCE apart, our attention was not called, or it was asked for what we do not know.
    """
    long = min(max_model_len, max([_TEXT, *(window + 12 for window in windows(model.config))]))
    texts = [_text(model, long), _text(model, min(long, _TEXT // 2))]
    for _ in range(_TRIES):
        model.set_attn_implementation("eager" if long <= 1024 or _softcapped(model.config) else "sdpa")
        expected = [_own_logits(model, text) for text in texts]
        cache = _cache_for(texts)
        try:
            model.set_attn_implementation(NAME)
            difference = _difference(expected, _logits(model, texts, cache))
        except (EngineError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ModelRefused(name, f"it does not run with Headrace's attention: {error}") from error
        if not cache.layers:
            raise ModelRefused(name, "its layers never call Headrace's attention")
        if difference <= TOLERANCE:
            return cache
        _log.warning("model %r: with Headrace's attention its logits differ by %.3g from its own", name, difference)
    raise ModelRefused(name, f"with Headrace's attention its logits differ by {difference:.3g} from its own")


@torch.inference_mode()
def refuse_eight_bit_cache(model: Any) -> str:
    """Why keys and values of this model cannot be kept in eight bits; empty where they can.

    Args:
        model: a Transformers decoder on its device, its attention ours.
    """
    texts = [_text(model, _TEXT), _text(model, _TEXT // 2)]
    if model.device.type != "cpu":
        return "keys and values in eight bits are for processors"
    plain = _logits(model, texts, _cache_for(texts))
    try:
        found = _logits(model, texts, _cache_for(texts, eight_bits=True))
    except EngineError as error:
        return str(error)
    return "" if _rounded(plain, found) else "with keys and values in eight bits its logits are others"


@torch.inference_mode()
def fuse_checked(model: Any, name: str, *, eight_bits: bool = False, eight_bit_cache: bool = False) -> bool:
    """Let our kernels compute the model where they can, unless it then says something else.

    Args:
        model: a Transformers decoder on its device, its attention ours.
        eight_bits: round weights to int8, except the vocabulary's.
        eight_bit_cache: keys and values will be kept so.

    Returns:
        Whether they do now.
    """
    texts = [_text(model, _TEXT), _text(model, _TEXT // 2)]
    plain = _logits(model, texts, _cache_for(texts))
    fused = fuse(model, eight_bits=eight_bits)
    if not fused:
        return False
    try:
        cache = _cache_for(texts, eight_bits=eight_bit_cache)
        if reason := chain(model, fused, lambda: _logits(model, texts, cache)):
            _log.info("model %r: its layers are called one by one: %s", name, reason)
        found = _logits(model, texts, cache)
        if _rounded(plain, found):
            return True
        reason = "its logits were others"
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = str(error)
    _log.warning("model %r runs on torch's own operators, which is slower: with our kernels %s", name, reason)
    fused.undo()
    return False


def windows(config: Any) -> list[int]:
    """Every length at which some layer of this model stops looking back."""
    found = [getattr(config, field, None) for field in ("sliding_window", "attention_chunk_size")]
    return [window for window in found if window]


def _text(model: Any, tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(tokens)
    ids: list[int] = torch.randint(model.get_input_embeddings().num_embeddings, (tokens,), generator=generator).tolist()
    return ids


def _own_logits(model: Any, text: list[int]) -> Tensor:
    """The model's own, at the positions we compare; float32 [positions, vocab]."""
    keep = [row for begin, end in _cuts(len(text)) for row in range(max(begin, end - _COMPARED), end)]
    output = model(
        input_ids=torch.tensor([text]),
        position_ids=torch.arange(len(text)).unsqueeze(0),
        use_cache=False,
        logits_to_keep=torch.tensor(keep),
    )
    logits: Tensor = output.logits[0]
    return logits


def _cache_for(texts: list[list[int]], *, eight_bits: bool = False) -> KVCache:
    return KVCache(sum(blocks_of(len(text)) for text in texts), eight_bits=eight_bits)


def _logits(model: Any, texts: list[list[int]], cache: KVCache) -> list[Tensor]:
    """With our attention, while the texts pass through together: float32 [positions, vocab] each."""
    blocks = iter(reversed(range(cache.blocks)))  # in no order that is their texts'
    sequences = [_sequence(text, [next(blocks) for _ in range(blocks_of(len(text)))]) for text in texts]
    rounds = list(zip(*(_cuts(len(text)) for text in texts), strict=True))
    ours: list[list[Tensor]] = [[] for _ in texts]
    for cuts in rounds:
        step = Step(tuple(Slice(sequence, *cut) for sequence, cut in zip(sequences, cuts, strict=True)))
        batch = build_batch(step, model.device)
        keep = [list(range(max(span.first, span.last - _COMPARED), span.last)) for span in batch.spans]
        batch = dataclasses.replace(batch, keep=torch.tensor([row for rows in keep for row in rows]).to(model.device))
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=batch.keep,
            headrace=Pass(batch, cache),
        )
        for mine, logits in zip(ours, output.logits[0].float().split([len(rows) for rows in keep]), strict=True):
            mine.append(logits)
    return [torch.cat(logits) for logits in ours]


def _rounded(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Rounding explains the difference."""
    return _difference(expected, found) <= _ROUNDING * max(float(logits.abs().max()) for logits in expected)


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest; infinite where one is no number."""
    all_of = [float((own - other).abs().max()) for own, other in zip(expected, found, strict=True)]
    return float("inf") if any(map(math.isnan, all_of)) else max(all_of)


def _cuts(tokens: int) -> list[tuple[int, int]]:
    """A slice from the start, single tokens, a slice again: every way a text passes through a step."""
    edges = [0, tokens // 2, tokens // 2 + 1, tokens // 2 + 2, tokens - 1, tokens]
    return list(itertools.pairwise(edges))


def _sequence(text: list[int], blocks: list[int]) -> Sequence:
    request = Request(token_ids=tuple(text))
    return Sequence("check", request, text, len(text), len(text) + 1, 0, Answer(NoText()), blocks=blocks)


def _softcapped(config: Any) -> bool:
    return getattr(config, "attn_logit_softcapping", None) is not None
