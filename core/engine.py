"""Many jobs, one model: add, cancel, step. The heart of the core; knows no queue, no Redis and no HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from core.attention import KVCache
from core.batch import Batch, build_batch
from core.blocks import BLOCK_TOKENS, BlockPool
from core.budget import StepBudget
from core.card import OPTIONAL_PARAMS, RESUME, RESUME_SAMPLED, ModelCard, headrace_version
from core.choices import Choices
from core.draws import draws_of
from core.errors import GrammarRefused, HeadraceError, ModelRefused, OutOfMemory
from core.grammar import Constraint, Grammars
from core.memory import cache_tokens, free_unused, is_out_of_memory, parse_size, usual_tokens
from core.models.load import LoadedModel, load_model
from core.models.source import resolve
from core.reader import Reader
from core.request import (
    Emitted,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Kind,
    Request,
    Result,
    TokenEvent,
)
from core.runners.decoder import DecoderRunner
from core.sampler import Drawn, draw
from core.scheduler import Scheduler, Step
from core.sequence import Sequence

DTYPES = ("auto", "float32", "bfloat16", "int8")
KV_DTYPES = ("auto", "model", "int8")
_PATIENCE_SECONDS = 0.02  #: of a step in which every job waits for its grammar


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What one engine computes, and with how much.

    Raises:
        ValueError: naming the field and the value.
    """

    model: str = "smollm2-135m"  #: an alias, a folder or a hub name
    revision: str = ""  #: of a hub model
    dtype: str = "auto"  #: auto, float32, bfloat16 or int8
    kv_dtype: str = "auto"  #: of keys and values: auto (int8 with dtype int8), model (as it computes) or int8
    device: str = "auto"  #: auto, cpu, cuda or cuda:N
    kv_memory: str = "auto"  #: of all keys and values: auto, or a size such as 2GiB
    max_model_len: int = 0  #: prompt and answer together, in tokens; 0: as much as the model takes
    max_running: int = 32  #: sequences computed at once
    step_tokens: int = 256  #: the most tokens that pass through the model in one step
    prefix_cache: bool = True  #: full blocks stay known, for texts that begin alike
    threads: int = 0  #: of torch; 0: as torch has it
    hf_token: str = ""

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("kv_dtype", KV_DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name, low in (("max_model_len", 0), ("max_running", 1), ("step_tokens", 1), ("threads", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be at least {low}, not {getattr(self, name)!r}")
        if self.kv_memory != "auto":
            parse_size(self.kv_memory)


class Engine:
    """One loaded decoder that computes many jobs at once; see ``core.protocol.EngineProtocol``."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        pool = BlockPool(_slots(loaded, config))
        self._loaded = loaded
        self._scheduler = Scheduler(pool, max_running=config.max_running, prefix_cache=config.prefix_cache)
        self._budget = StepBudget(config.step_tokens)
        self._runner = DecoderRunner(loaded.model, KVCache(pool.blocks, eight_bits=loaded.eight_bit_cache))
        self._jobs: dict[str, Choices[Sequence]] = {}  # the scheduler has those of their sequences that go on
        self.stats = self._scheduler.stats
        self._grammars = Grammars(loaded.tokenizer, loaded.vocab_size, loaded.end_ids)
        self.card = _card(loaded, config, pool.tokens)
        if not self._grammars.supported:
            self.card = self.card.without("structured_outputs")
        self._reader = Reader(loaded.tokenizer, loaded.end_ids, self.card)

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Fetch, load and check the model.

        Raises:
            ModelNotFound, ModelRefused: the operator's move.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        folder = resolve(config.model, revision=config.revision, token=config.hf_token)
        return cls(load_model(folder, config.model, config.dtype, config.kv_dtype, config.device), config)

    @property
    def room(self) -> int:
        waiting = sum(len(self._jobs[job_id].going_on) for job_id in self._grammars.waiting)
        return max(0, self._scheduler.room - waiting)

    @property
    def idle(self) -> bool:
        return not self._jobs

    def add(self, job_id: str, request: Request, emitted: tuple[Emitted, ...] = ()) -> None:
        job = self._reader.read(job_id, request, emitted)
        self.drop(job_id)
        self._jobs[job_id] = job
        asked = request.params.structured_outputs
        if asked is not None and job.going_on:
            self._grammars.begin(job_id, asked)
        else:
            self._schedule(job)

    def cancel(self, job_id: str, reason: FinishReason = "cancelled") -> None:
        if (job := self._jobs.get(job_id)) is not None:
            self._let_go(job)
            job.end(reason)

    def drop(self, job_id: str) -> None:
        if (job := self._jobs.pop(job_id, None)) is not None:
            self._let_go(job)

    def step(self) -> list[Event]:
        started = time.perf_counter()
        events = self._start_compiled() + self._finish_ended()
        events += self._compute(self._scheduler.plan(self._budget.tokens))
        self._budget.end_step()
        self.stats.steps += 1
        self.stats.step_seconds += time.perf_counter() - started
        return events

    def generate(self, requests: Iterable[Request]) -> list[Result]:
        """Compute requests together and return their results in the same order; for use without a queue.

        Raises:
            HeadraceError: one of them cannot be computed; all are given up then.
        """
        names: list[str] = []
        results: dict[str, Result] = {}
        try:
            for number, request in enumerate(requests):
                self.add(f"generate-{number}", request)
                names.append(f"generate-{number}")
            while not self.idle:
                for event in self.step():
                    if isinstance(event, FailedEvent):
                        raise event.error
                    if isinstance(event, FinishedEvent):
                        results[event.job_id] = event.result
        except HeadraceError:
            for name in names:
                self.drop(name)
            raise
        return [results[name] for name in names]

    def _schedule(self, job: Choices[Sequence]) -> None:
        for sequence in job.going_on:
            self._scheduler.add(sequence)

    def _let_go(self, job: Choices[Sequence]) -> None:
        """Neither its grammar is waited for any more, nor is it computed."""
        if not self._grammars.forget(job.job_id):
            self._scheduler.remove(*job.going_on)

    def _start_compiled(self) -> list[Event]:
        """Jobs whose grammar is compiled begin; those that have none end. Where all wait for theirs, so do we."""
        events: list[Event] = []
        idle = len(self._grammars.waiting) == len(self._jobs)
        for job_id, grammar in self._grammars.ready(patience_seconds=_PATIENCE_SECONDS if idle else 0):
            if isinstance(grammar, GrammarRefused):
                events.append(self._fail(job_id, grammar))
                continue
            self._grammars.forget(job_id)
            for sequence in self._jobs[job_id].going_on:
                assert sequence.rules is not None
                sequence.rules.constraint = Constraint(grammar)
            self._schedule(self._jobs[job_id])
        return events

    def _finish_ended(self) -> list[Event]:
        """Let those go that ended between two steps: cancelled, or complete with what was emitted before."""
        return [self._finish(job) for job in list(self._jobs.values()) if job.ended]

    def _finish(self, job: Choices[Sequence]) -> Event:
        del self._jobs[job.job_id]
        return FinishedEvent(job_id=job.job_id, result=job.result())

    def _compute(self, step: Step) -> list[Event]:
        """Pass a step through the model; where memory does not suffice, one half of it after the other."""
        if not step.slices:
            return []
        if (passed := self._pass(step)) is not None:
            self._budget.fitted(step.tokens)
            return self._advance(step, *passed)
        self._budget.exceeded()
        if step.tokens == 1:
            return [self._fail(step.slices[0].sequence.job_id, OutOfMemory())]
        return [event for half in step.halves() for event in self._compute(half.still_running())]

    def _pass(self, step: Step) -> tuple[Batch, list[Drawn]] | None:
        """Compute and draw; None where memory does not suffice.

        That leaves nothing behind but keys and values in slots of these very tokens, which the next try writes again.
        """
        try:
            batch = build_batch(step, self._loaded.device, pad=self._loaded.dtype is torch.float32)
            return batch, draw(self._runner.forward(batch), draws_of(step, batch))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_unused(self._loaded.device)  # out here the error is gone, and with it what its traceback held
        return None

    def _fail(self, job_id: str, error: Exception) -> Event:
        self.drop(job_id)
        return FailedEvent(job_id=job_id, error=error)

    def _advance(self, step: Step, batch: Batch, drawn: list[Drawn]) -> list[Event]:
        """Write down what the step computed, and say what happened."""
        events: list[Event] = []
        rows, decoded = iter(drawn), 0
        for piece, count in zip(step.slices, batch.row_counts, strict=True):
            sequence, tokens = piece.sequence, [next(rows) for _ in range(count)]
            if sequence.job_id not in self._jobs:
                continue  # it failed with another of its choices
            self.stats.prompt_tokens += max(0, min(piece.end, sequence.prompt_tokens) - piece.begin)
            if tokens and sequence.rules is not None and sequence.rules.refusal is not None:
                events.append(self._fail(sequence.job_id, sequence.rules.refusal))
                continue
            self._scheduler.advance(piece)
            if sequence.predicts:
                sequence.accept_predicted(piece.begin, [token.token_id for token in tokens])
            elif tokens:
                sequence.score_prompt(piece.begin, [token.logprob for token in tokens])
                if piece.completes and sequence.answer.finish_reason is None:
                    events.append(_accept(sequence, tokens[-1]))
                    decoded += 1
            if sequence.ended:
                events += self._end(sequence)
        if decoded:
            self.stats.generated_tokens += decoded
            self.stats.decode_rows[decoded] = self.stats.decode_rows.get(decoded, 0) + 1
        return events

    def _end(self, sequence: Sequence) -> list[Event]:
        """Free what an ended sequence had; with its job's last one the job is finished."""
        self._scheduler.remove(sequence)
        job = self._jobs[sequence.job_id]
        return [self._finish(job)] if job.ended else []


def _accept(sequence: Sequence, token: Drawn) -> TokenEvent:
    return TokenEvent(
        job_id=sequence.job_id,
        index=sequence.index,
        text=sequence.accept(token.token_id, token.logprob),
        token_ids=(token.token_id,),
        logprobs=None if token.logprob is None else (token.logprob,),
    )


def _slots(loaded: LoadedModel, config: EngineConfig) -> int:
    """How many tokens' keys and values there is memory for."""
    limit = min(filter(None, (config.max_model_len, loaded.max_model_len)))
    wanted = usual_tokens(config.max_running, limit) + config.max_running * BLOCK_TOKENS
    slots = cache_tokens(config.kv_memory, loaded.bytes_per_token, wanted, loaded.device)
    if slots < BLOCK_TOKENS:
        raise ModelRefused(config.model, f"kv_memory holds {slots} tokens of it, and {BLOCK_TOKENS} are the least")
    return slots


def _card(loaded: LoadedModel, config: EngineConfig, slots: int) -> ModelCard:
    tokenizer = loaded.tokenizer
    return ModelCard(
        name=config.model,
        engine="torch",
        version=headrace_version(),
        dtype=loaded.computes_in,
        weights=loaded.weights,
        kinds=tuple(kind.value for kind in Kind),
        text=tokenizer is not None,
        chat=tokenizer is not None and tokenizer.chat,
        max_model_len=min(filter(None, (config.max_model_len, loaded.max_model_len, slots))),
        vocab_size=loaded.vocab_size,
        device=str(loaded.device),
        abilities=(*OPTIONAL_PARAMS, RESUME, RESUME_SAMPLED),
    )
