"""An engine without a model: token k of choice i is a hash of prompt, seed, i and k. Standard library only.

It ships for load tests, crash tests and people who try the queue before they have a model. It keeps every promise of
``EngineProtocol``: resuming, cancelling, stop strings, log-probabilities. Test hooks: a prompt that starts with

    !crash      kills the process (SIGKILL) when the job is stepped: a poison job
    !crash 3    … once it has 3 tokens, all choices together
    !fail       ends the job with an EngineError
    !raise      the step raises: an engine with a fault
    !hang       the step never returns
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from core.card import ModelCard, headrace_version
from core.choices import Choices
from core.errors import EngineError, InvalidField, PromptTooLong
from core.protocol import EngineStats
from core.request import (
    Choice,
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

VOCABULARY = 1_000
MAX_MODEL_LEN = 131_072


@dataclass(frozen=True, slots=True, kw_only=True)
class InstantConfig:
    """How the instant engine pretends to work."""

    name: str = "instant"  #: the model's name
    step_seconds: float = 0.0  #: sleep this long in each step
    max_running: int = 32  #: sequences at once

    def __post_init__(self) -> None:
        if not 0 <= self.step_seconds <= 3600:
            raise ValueError(f"step_seconds: must be from 0 to 3600, not {self.step_seconds!r}")
        if self.max_running < 1:
            raise ValueError(f"max_running: must be at least 1, not {self.max_running!r}")


@dataclass(slots=True, eq=False)
class InstantSequence:
    """One choice while it is computed.

    Invariant: ``sent <= len(text)``; the rest is held back because it may be the beginning of a stop string.
    """

    job_id: str
    request: Request
    key: bytes  #: what the tokens are a hash of
    index: int
    most_tokens: int  #: the answer never grows past this
    tokens: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    scored: list[TokenLogprob] | None = None
    cached: int | None = None
    text: str = ""
    sent: int = 0  #: leading characters of ``text`` that are published
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ending: FinishReason | None = None  #: set when there is nothing more to draw

    @property
    def ended(self) -> bool:
        """Nothing is left to draw."""
        return self.ending is not None

    def end(self, reason: FinishReason) -> None:
        """End here, unless it has ended."""
        self.ending = self.ending or reason

    def choice(self) -> Choice:
        """What is stored at the end; the sequence has ended."""
        assert self.ending is not None
        return Choice(
            index=self.index,
            text=self.text[: self.sent],
            finish_reason=self.ending,
            token_ids=tuple(self.tokens),
            logprobs=None if self.request.params.logprobs is None else tuple(self.logprobs),
        )


class InstantEngine:
    """``EngineProtocol`` at the speed of a hash."""

    def __init__(self, config: InstantConfig | None = None, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._config = config or InstantConfig()
        self._sleep = sleep
        self._jobs: dict[str, Choices[InstantSequence]] = {}
        self.stats = EngineStats()
        self.card = ModelCard(
            name=self._config.name,
            engine="instant",
            version=headrace_version(),
            dtype="none",
            weights=hashlib.sha256(b"instant 1").hexdigest(),
            kinds=(Kind.GENERATE.value, Kind.PREDICT.value),
            text=True,
            chat=True,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCABULARY,
        )

    @property
    def room(self) -> int:
        return max(0, self._config.max_running - sum(len(job.going_on) for job in self._jobs.values()))

    @property
    def idle(self) -> bool:
        return not self._jobs

    def add(self, job_id: str, request: Request, emitted: tuple[Emitted, ...] = ()) -> None:
        self.card.refuse(request)
        job = self._jobs[job_id] = _take(job_id, request, emitted)
        self.stats.prompt_tokens += sum(job.prompt_tokens + len(sequence.tokens) for sequence in job.sequences)

    def cancel(self, job_id: str, reason: FinishReason = "cancelled") -> None:
        if (job := self._jobs.get(job_id)) is not None:
            job.end(reason)

    def drop(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)

    def step(self) -> list[Event]:
        start = time.perf_counter()
        if self._config.step_seconds:
            self._sleep(self._config.step_seconds)
        events: list[Event] = []
        places = self._config.max_running
        for job in sorted(self._jobs.values(), key=_turn):
            running = job.going_on[:places]
            places -= len(running)
            events += self._advance(job, running)
        self._count(self._config.max_running - places, time.perf_counter() - start)
        return events

    def _advance(self, job: Choices[InstantSequence], running: list[InstantSequence]) -> list[Event]:
        """One token more for each choice that runs, or the job's end, or both."""
        if (error := _obey_prompt(job)) is not None:
            del self._jobs[job.job_id]
            return [FailedEvent(job_id=job.job_id, error=error)]
        events: list[Event] = [_draw(sequence) for sequence in running]
        if job.ended:
            del self._jobs[job.job_id]
            events.append(FinishedEvent(job_id=job.job_id, result=job.result()))
        return events

    def _count(self, rows: int, seconds: float) -> None:
        self.stats.steps += 1
        self.stats.step_seconds += seconds
        self.stats.generated_tokens += rows
        if rows:
            self.stats.decode_rows[rows] = self.stats.decode_rows.get(rows, 0) + 1


def _turn(job: Choices[InstantSequence]) -> tuple[bool, int]:
    """What has begun goes on, then the lower priority goes first."""
    return not any(sequence.tokens for sequence in job.sequences), job.request.priority


def _take(job_id: str, request: Request, emitted: tuple[Emitted, ...]) -> Choices[InstantSequence]:
    """The job as it stood after ``emitted``."""
    params, prompt_tokens = request.params, _count_prompt(request)
    if request.kind is Kind.PREDICT:
        return Choices(job_id, request, prompt_tokens, (_predict(job_id, request),))
    seed = (params.seed if params.seed is not None else job_id) if params.temperature else None
    key = hashlib.sha256(json.dumps([request.to_wire()["input"], seed]).encode()).digest()
    most = min(params.max_tokens, MAX_MODEL_LEN - prompt_tokens)
    sequences = tuple(InstantSequence(job_id, request, key, index, most) for index in range(params.n))
    for sequence, published in zip(sequences, emitted, strict=False):
        for token_id in published.token_ids:
            _append(sequence, token_id)
    return Choices(job_id, request, prompt_tokens, sequences)


def _predict(job_id: str, request: Request) -> InstantSequence:
    """All there is to say at once: nothing is drawn."""
    following = [(7 * token_id + 1) % VOCABULARY for token_id in request.token_ids or ()]
    return InstantSequence(job_id, request, b"", 0, 0, predicted=following, ending="stop")


def _count_prompt(request: Request) -> int:
    """Tokens of the prompt: words of a text, ids of a list.

    Raises:
        RequestError: too long, or an id outside the vocabulary.
    """
    param = "input.token_ids" if request.kind is Kind.PREDICT else "input.prompt_token_ids"
    if request.token_ids is not None:
        if max(request.token_ids) >= VOCABULARY:
            raise InvalidField(param, f"must hold token ids below {VOCABULARY}, this model's vocabulary")
        tokens = len(request.token_ids)
    else:
        texts = [request.prompt or ""] if request.messages is None else [m.content for m in request.messages]
        tokens, param = max(1, sum(len(text.split()) for text in texts)), "input"
    if tokens >= MAX_MODEL_LEN:
        raise PromptTooLong(tokens, MAX_MODEL_LEN - 1, param)
    return tokens


def _obey_prompt(job: Choices[InstantSequence]) -> EngineError | None:
    """Do what a prompt with a test hook says; its error, if it asks for one."""
    word, _, count = (job.request.prompt or "").partition(" ")
    drawn = sum(len(sequence.tokens) for sequence in job.sequences)
    if word == "!crash" and drawn >= (int(count) if count.isdecimal() else 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "!raise":
        raise RuntimeError("the prompt asked for a fault")
    while word == "!hang":
        time.sleep(3600)
    return EngineError("the prompt asked for a failure") if word == "!fail" else None


def _draw(sequence: InstantSequence) -> TokenEvent:
    """Draw the next token; the event carries the text that can no longer become a stop string."""
    token_id, before = _token(sequence, len(sequence.tokens)), sequence.sent
    _append(sequence, token_id)
    logprobs = None if sequence.request.params.logprobs is None else (sequence.logprobs[-1],)
    text = sequence.text[before : sequence.sent]
    return TokenEvent(job_id=sequence.job_id, index=sequence.index, text=text, token_ids=(token_id,), logprobs=logprobs)


def _token(sequence: InstantSequence, k: int) -> int:
    salt = sequence.index.to_bytes(16, "little")  # the first choice's is what an absent one is
    digest = hashlib.blake2b(sequence.key + k.to_bytes(4, "big"), digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "big") % VOCABULARY


def _append(sequence: InstantSequence, token_id: int) -> None:
    """Take one token in, and see whether it is the last."""
    params, known = sequence.request.params, len(sequence.text)
    sequence.tokens.append(token_id)
    sequence.text += f"w{token_id} "
    if params.logprobs is not None:
        sequence.logprobs.append(_logprob(token_id, params.logprobs))
    start = max(0, known - max(map(len, params.stop), default=0))
    found = [at for at in (sequence.text.find(stop, start) for stop in params.stop) if at >= 0]
    if found:
        sequence.text, sequence.ending = sequence.text[: min(found)], "stop"
    elif len(sequence.tokens) >= sequence.most_tokens:
        sequence.ending = "length"
    held = 0 if sequence.ending else _held_back(sequence.text, params.stop)
    sequence.sent = len(sequence.text) - held


def _held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop string."""
    longest = max(map(len, stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def _logprob(token_id: int, likeliest: int) -> TokenLogprob:
    top = tuple(((token_id + place) % VOCABULARY, -0.5 - place) for place in range(likeliest))
    return TokenLogprob(token_id=token_id, logprob=-0.5, top=top)
