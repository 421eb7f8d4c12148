"""What computes, and whether two workers compute alike. Standard library only; knows no engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import metadata

from core.bounds import Wire
from core.errors import UnsupportedRequest
from core.request import Request, SamplingParams

CHECKSUM_DIGITS = 16  #: of the weights' checksum, where two engines are told apart

#: Parameters that a card which names no abilities has all the same: there were no others when it was written.
FIRST_PARAMS = ("n", "seed", "top_p", "top_k", "min_p", "logprobs")
#: Newer ones for which a token that an earlier attempt drew counts like one of the prompt.
MEMORYLESS_PARAMS = ("repetition_penalty", "logit_bias", "stop_token_ids")
#: Parameters that not every engine has: a request with one is refused where the card does not name it.
OPTIONAL_PARAMS = (
    *FIRST_PARAMS,
    *MEMORYLESS_PARAMS,
    *("presence_penalty", "frequency_penalty", "min_tokens", "bad_words", "prompt_logprobs", "structured_outputs"),
)
RESUME = "resume"  #: a greedy answer that another attempt began goes on with the tokens of the undisturbed run
RESUME_SAMPLED = "resume_sampled"  #: … and so does one that was drawn
#: On the wire and in Redis: add, never rename. What is added is not what a card that says nothing can do.
ALL_ABILITIES = (*FIRST_PARAMS, RESUME, RESUME_SAMPLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What computes: enough to tell whether two workers compute alike, and what may be asked of them."""

    name: str  #: the name a request gives
    engine: str  #: "torch", "instant" or "vllm"
    version: str  #: of Headrace, and of what else decides the tokens
    dtype: str
    weights: str  #: sha256 of weights, configuration and tokenizer, hexadecimal
    kinds: tuple[str, ...]
    text: bool  #: has a tokenizer: takes prompts and answers with text
    chat: bool  #: has a chat template: takes messages
    max_model_len: int  #: prompt and answer together, in tokens
    vocab_size: int
    device: str = "cpu"
    abilities: tuple[str, ...] = ALL_ABILITIES  #: what a card written before there were any could do

    @property
    def identity(self) -> str:
        """Equal for two workers exactly if one may go on where the other stopped."""
        return f"{self.engine}-{self.version}-{self.dtype}-{self.weights[:CHECKSUM_DIGITS]}"

    def refuse(self, request: Request) -> None:
        """Raise ``UnsupportedRequest``, naming the field, for what this engine cannot do."""
        if request.kind.value not in self.kinds:
            raise UnsupportedRequest("kind", f"the {self.engine} engine computes {', '.join(self.kinds)} only")
        for name in OPTIONAL_PARAMS:
            if name not in self.abilities and getattr(request.params, name) != getattr(_DEFAULT, name):
                raise UnsupportedRequest(f"params.{name}", f"the {self.engine} engine does not have it")

    def without(self, ability: str) -> ModelCard:
        """The card of an engine that lacks one more."""
        return dataclasses.replace(self, abilities=tuple(name for name in self.abilities if name != ability))

    def to_wire(self) -> Wire:
        return {**dataclasses.asdict(self), "kinds": list(self.kinds), "abilities": list(self.abilities)}

    @classmethod
    def from_wire(cls, wire: Wire) -> ModelCard:
        """Read ``to_wire``'s, or one of a version that knew fewer fields."""
        abilities = tuple(wire.get("abilities", ALL_ABILITIES))
        return cls(**{**wire, "kinds": tuple(wire["kinds"]), "abilities": abilities})


_DEFAULT = SamplingParams()


def headrace_version() -> str:
    """This installation's, for a card."""
    try:
        return metadata.version("headrace")
    except metadata.PackageNotFoundError:
        return "0"  # a checkout that nobody installed
