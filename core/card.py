"""What computes, and whether two workers compute alike. Standard library only; knows no engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from core.bounds import Wire

CHECKSUM_DIGITS = 16  #: of the weights' checksum, where two engines are told apart


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What computes: enough to tell whether two workers compute alike, and what may be asked of them."""

    name: str  #: the name a request gives
    engine: str  #: "torch" or "instant"
    version: str  #: of Headrace
    dtype: str
    weights: str  #: sha256 of weights, configuration and tokenizer, hexadecimal
    kinds: tuple[str, ...]
    text: bool  #: has a tokenizer: takes prompts and answers with text
    chat: bool  #: has a chat template: takes messages
    max_model_len: int  #: prompt and answer together, in tokens
    vocab_size: int
    device: str = "cpu"

    @property
    def identity(self) -> str:
        """Equal for two workers exactly if one may go on where the other stopped."""
        return f"{self.engine}-{self.version}-{self.dtype}-{self.weights[:CHECKSUM_DIGITS]}"

    def to_wire(self) -> Wire:
        return {**dataclasses.asdict(self), "kinds": list(self.kinds)}

    @classmethod
    def from_wire(cls, wire: Wire) -> ModelCard:
        return cls(**{**wire, "kinds": tuple(wire["kinds"])})
