"""vLLM's engine behind our protocol: its batching, memory and cards, our prompts, text, stop strings and resuming.

Every choice of a job is a request of vLLM's, which sees token ids and gives token ids. Knows no queue.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

from core.card import FIRST_PARAMS, MEMORYLESS_PARAMS, RESUME, ModelCard, headrace_version
from core.choices import Choices
from core.errors import EngineError, ModelRefused, UnsupportedRequest
from core.memory import available_bytes, parse_size
from core.models.checksum import checksum
from core.models.source import resolve
from core.protocol import EngineStats
from core.reader import Reader
from core.request import (
    Emitted,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Kind,
    Request,
    TokenEvent,
    TokenLogprob,
)
from core.sequence import Sequence
from core.tokenizer import Tokenizer
from core.vllm_args import check_names


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    """What one vLLM engine computes, and with how much.

    Raises:
        ValueError: naming the field and the value.
    """

    model: str = "smollm2-135m"  #: an alias, a folder or a hub name
    revision: str = ""
    dtype: str = "auto"
    device: str = "auto"  #: auto, or what this build of vLLM computes on
    kv_memory: str = "auto"  #: auto: as vLLM finds it on a card, as our own engine does on processors
    max_model_len: int = 0
    max_running: int = 32
    step_tokens: int = 256
    hf_token: str = dataclasses.field(default="", repr=False)
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)  #: more of ``EngineArgs``, by its names

    def __post_init__(self) -> None:
        check_names(self.args, {field.name for field in dataclasses.fields(EngineArgs)}, vllm.__version__)
        if self.device not in ("auto", current_platform.device_type):
            raise ValueError(f"device: is {self.device}, and this vLLM computes on {current_platform.device_type}")

    def to_vllm(self, folder: Path) -> EngineArgs:
        """Our settings under vLLM's names."""
        return EngineArgs(
            model=str(folder),
            dtype=self.dtype,
            skip_tokenizer_init=True,
            max_model_len=self.max_model_len or None,
            max_num_seqs=self.max_running,
            max_num_batched_tokens=max(self.step_tokens, self.max_running),
            kv_cache_memory_bytes=self._cache_bytes(),
            **{"disable_log_stats": True, "scheduling_policy": "priority", **self.args},
        )

    def _cache_bytes(self) -> int | None:
        """None leaves it to vLLM, which takes nearly all of a card; of a host it would take as much, or not start."""
        if self.kv_memory != "auto":
            return parse_size(self.kv_memory)
        if current_platform.is_cpu() and "gpu_memory_utilization" not in self.args:
            return available_bytes(torch.device("cpu"))
        return None


class VllmEngine:
    """Many jobs in one vLLM engine; see ``core.protocol.EngineProtocol``."""

    def __init__(self, engine: Any, reader: Reader, card: ModelCard, max_running: int) -> None:
        self._engine = engine
        self._reader = reader
        self._max_running = max_running
        self._jobs: dict[str, Choices[Sequence]] = {}
        self._requests: dict[str, Sequence] = {}  # those that vLLM computes, by the name that it knows them by
        self.card = card
        self.stats = EngineStats()

    @classmethod
    def load(cls, config: VllmConfig) -> VllmEngine:
        """Fetch and load the model.

        Raises:
            ModelNotFound, ModelRefused: the operator's move.
        """
        folder = resolve(config.model, revision=config.revision, token=config.hf_token)
        tokenizer = Tokenizer.load(folder)
        try:
            settled = config.to_vllm(folder).create_engine_config()
        except (ValueError, TypeError, VLLMClientError) as error:
            raise ModelRefused(config.model, f"vLLM says: {error}") from error
        # In this process: what kills the worker ends the engine, and a step that hangs is a loop that hangs.
        engine = LLMEngine(settled, Executor.get_class(settled), log_stats=False, multiprocess_mode=False)
        card = _card(config, settled.model_config, tokenizer, checksum(folder))
        return cls(engine, Reader(tokenizer, _end_ids(folder, tokenizer), card), card, config.max_running)

    @property
    def room(self) -> int:
        return max(0, self._max_running - len(self._requests))

    @property
    def idle(self) -> bool:
        return not self._jobs

    def add(self, job_id: str, request: Request, emitted: tuple[Emitted, ...] = ()) -> None:
        job = self._reader.read(job_id, request, emitted)
        self.drop(job_id)
        try:
            for sequence in job.going_on:
                name, told = _name(sequence), (_prompt(sequence), _params(sequence))
                self._engine.add_request(name, *told, priority=request.priority)
                self._requests[name] = sequence
        except (ValueError, VLLMClientError) as error:
            self._abort(job.sequences)
            param = getattr(error, "parameter", None)
            raise UnsupportedRequest(f"params.{param}" if param else "params", f"vLLM says: {error}") from error
        self._jobs[job_id] = job

    def cancel(self, job_id: str, reason: FinishReason = "cancelled") -> None:
        if (job := self._jobs.get(job_id)) is not None:
            self._abort(job.sequences)
            job.end(reason)

    def drop(self, job_id: str) -> None:
        if (job := self._jobs.pop(job_id, None)) is not None:
            self._abort(job.sequences)

    def step(self) -> list[Event]:
        started = time.perf_counter()
        events: list[Event] = [self._finish(job) for job in list(self._jobs.values()) if job.ended]
        if self._requests:
            events += self._take(self._engine.step())
        self.stats.steps += 1
        self.stats.step_seconds += time.perf_counter() - started
        return events

    def _take(self, outputs: Iterable[Any]) -> list[Event]:
        """What vLLM drew, put into our words."""
        events: list[Event] = []
        rows = 0
        for output in outputs:
            sequence = self._requests.get(output.request_id)
            if sequence is None:
                continue  # aborted while the step was under way
            new = [*self._accept(sequence, output.outputs[0])]
            rows += bool(new)
            events += new
            if output.finished and not sequence.ended:
                events.append(self._fail(sequence.job_id, output.outputs[0].finish_reason))
            elif sequence.ended:
                events += self._end(sequence)
        if rows:
            self.stats.decode_rows[rows] = self.stats.decode_rows.get(rows, 0) + 1
        return events

    def _accept(self, sequence: Sequence, drawn: Any) -> Iterator[TokenEvent]:
        """Append what was drawn; several tokens a step where vLLM speculates."""
        if sequence.computed == 0 and drawn.token_ids:
            self.stats.prompt_tokens += sequence.prompt_tokens
        for number, token_id in enumerate(drawn.token_ids):
            if sequence.ended:
                return
            likely = sequence.request.params.logprobs
            logprob = None if likely is None else _logprob(token_id, drawn.logprobs[number], likely)
            sequence.computed = len(sequence.tokens)
            text = sequence.accept(token_id, logprob)
            self.stats.generated_tokens += 1
            said, index = None if logprob is None else (logprob,), sequence.index
            yield TokenEvent(job_id=sequence.job_id, index=index, text=text, token_ids=(token_id,), logprobs=said)

    def _end(self, sequence: Sequence) -> list[Event]:
        self._abort([sequence])
        job = self._jobs[sequence.job_id]
        return [self._finish(job)] if job.ended else []

    def _finish(self, job: Choices[Sequence]) -> Event:
        del self._jobs[job.job_id]
        return FinishedEvent(job_id=job.job_id, result=job.result())

    def _fail(self, job_id: str, reason: object) -> Event:
        self.drop(job_id)
        return FailedEvent(job_id=job_id, error=EngineError(f"vLLM ended the request by itself: {reason}"))

    def _abort(self, sequences: Iterable[Sequence]) -> None:
        """Let vLLM forget them; those it has finished it has forgotten already."""
        if names := [name for name in map(_name, sequences) if self._requests.pop(name, None) is not None]:
            self._engine.abort_request(names)


def _name(sequence: Sequence) -> str:
    return f"{sequence.job_id}/{sequence.index}"


def _prompt(sequence: Sequence) -> Any:
    """What vLLM reads: the prompt and what was published, and who may share its cache."""
    return tokens_input(list(sequence.tokens), cache_salt=sequence.request.cache_salt)


def _params(sequence: Sequence) -> SamplingParams:
    """Ours under vLLM's names. Where an answer ends is for us to say, so that all engines end alike."""
    asked = sequence.request.params
    return SamplingParams(
        max_tokens=sequence.most_tokens - len(sequence.tokens),
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=_seed(sequence) if asked.temperature else None,
        logprobs=asked.logprobs,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=dict(asked.logit_bias) or None,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _seed(sequence: Sequence) -> int:
    """A choice's own, and its position's: a successor's draws are other ones, but the same each time."""
    text = f"{sequence.seed} {sequence.index} {len(sequence.drawn)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _logprob(token_id: int, found: Mapping[int, Any], likeliest: int) -> TokenLogprob:
    ranked = sorted(found.items(), key=lambda each: each[1].rank)
    top = tuple((other, each.logprob) for other, each in ranked[:likeliest])
    return TokenLogprob(token_id=token_id, logprob=found[token_id].logprob, top=top)


def _end_ids(folder: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end an answer, as the folder's files say."""
    found = set(() if tokenizer is None else tokenizer.end_ids)
    for name in ("config.json", "generation_config.json"):
        if (path := folder / name).is_file():
            written = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found.update([] if written is None else written if isinstance(written, list) else [written])
    return frozenset(found)


def _card(config: VllmConfig, model: Any, tokenizer: Tokenizer | None, weights: str) -> ModelCard:
    """Arguments such as a quantization change the tokens, so they count in the version."""
    args = json.dumps(dict(config.args), sort_keys=True)
    digest = f".{hashlib.sha256(args.encode()).hexdigest()[:8]}" if config.args else ""
    return ModelCard(
        name=config.model,
        engine="vllm",
        version=f"{headrace_version()}+vllm.{vllm.__version__}{digest}",
        dtype=str(model.dtype).removeprefix("torch."),
        weights=weights,
        kinds=(Kind.GENERATE.value,),
        text=tokenizer is not None,
        chat=tokenizer is not None and tokenizer.chat,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        device=current_platform.device_type,
        abilities=(*FIRST_PARAMS, *MEMORYLESS_PARAMS, RESUME),
    )
