"""The choices of one job while they are computed: which go on, when the job has ended, what it answers.

Standard library only, so that every engine has the same; knows no tensor and no way to draw a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from core.request import Choice, FinishReason, Kind, Request, Result, TokenLogprob, Usage


class Growing(Protocol):
    """One choice of a job, drawn token by token; a PREDICT job has one, which predicts."""

    predicted: list[int]  #: PREDICT: the likeliest next id of each computed position
    scored: list[TokenLogprob] | None  #: of the prompt's tokens from the second on; None: not wanted
    cached: int | None  #: prompt tokens whose keys were known; None: nobody looked

    @property
    def ended(self) -> bool:
        """Nothing is left to compute."""
        ...

    def end(self, reason: FinishReason) -> None:
        """End here, with what was shown; one that has ended stays as it is."""
        ...

    def choice(self) -> Choice:
        """What is stored of it; it has ended."""
        ...


S = TypeVar("S", bound=Growing)


@dataclass(frozen=True, slots=True, eq=False)
class Choices(Generic[S]):
    """One job in an engine. Its sequences know nothing of each other; the job ends with the last of them."""

    job_id: str
    request: Request
    prompt_tokens: int
    sequences: tuple[S, ...]  #: by index

    @property
    def going_on(self) -> list[S]:
        """Those that have not ended."""
        return [sequence for sequence in self.sequences if not sequence.ended]

    @property
    def ended(self) -> bool:
        """The job has its result."""
        return all(sequence.ended for sequence in self.sequences)

    def end(self, reason: FinishReason) -> None:
        """End those that go on."""
        for sequence in self.sequences:
            sequence.end(reason)

    def result(self) -> Result:
        """What is stored at the end; the job has ended."""
        if self.request.kind is Kind.PREDICT:
            [sequence] = self.sequences
            return Result(usage=Usage(prompt_tokens=self.prompt_tokens), token_ids=tuple(sequence.predicted))
        choices = tuple(sequence.choice() for sequence in self.sequences)
        drawn = sum(len(choice.token_ids) for choice in choices)
        cached, scored = self.sequences[0].cached or 0, self.sequences[0].scored
        usage = Usage(prompt_tokens=self.prompt_tokens, completion_tokens=drawn, cached_tokens=cached)
        return Result(usage=usage, choices=choices, prompt_logprobs=None if scored is None else (None, *scored))
