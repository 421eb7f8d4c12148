"""How many tokens may pass through the model at once, learnt from passes that found no memory. Integers only."""

from __future__ import annotations

import logging

log = logging.getLogger("headrace.core")

CALM_STEPS = 32  #: steps without a want of memory before twice as much is tried


class StepBudget:
    """The most tokens of the next step.

    A step that found no memory lowers it to the largest of its passes that went through, so that not every step after
    it runs into the same wall; each ``CALM_STEPS`` steps that found enough double it, up to what was configured.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.tokens = most
        self._calm_steps = 0
        self._fitted = 0  # tokens of this step's largest pass that went through
        self._exceeded = False  # this step found no memory

    def fitted(self, tokens: int) -> None:
        """A pass of so many tokens went through."""
        self._fitted = max(self._fitted, tokens)

    def exceeded(self) -> None:
        """A pass found no memory."""
        self._exceeded = True

    def end_step(self) -> None:
        """Settle on the most tokens of the next step."""
        self._calm_steps += 1
        if self._exceeded:
            self.tokens, self._calm_steps = self._fitted or self._most, 0  # nothing fitted: size was not the reason
            log.warning("a step found too little memory; the next ones have at most %d tokens", self.tokens)
        elif self._calm_steps >= CALM_STEPS:
            self.tokens, self._calm_steps = min(2 * self.tokens, self._most), 0
        self._fitted, self._exceeded = 0, False
