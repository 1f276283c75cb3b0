"""When to draft and when to stop: the bounds of SpecBound (arXiv 2604.12247, bounded speculation).

Pure Python on numbers. The runtime, the replay of logged traces and any controller run this same code, so that
what is predicted is what happens. Knows no tensors and no model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SpeculationBounds:
    """Bounds on drafting.

    Attributes:
        exit_threshold: tau, the confidence in [0, 1] from which a token exits as a draft. Above 1 nothing exits.
        max_exit_layer: the paper's d_max; a token that reaches it without an exit is hard and ends the draft.
        max_draft_tokens: the paper's w_max, drafts in a row before verification.
    """

    exit_threshold: float
    max_exit_layer: int
    max_draft_tokens: int

    def __post_init__(self) -> None:
        if not self.exit_threshold >= 0.0:
            raise ConfigError(f"exit_threshold is {self.exit_threshold}: expected a number of at least 0")
        if self.max_exit_layer < 0:
            raise ConfigError(f"max_exit_layer is {self.max_exit_layer}: expected at least 0")
        if self.max_draft_tokens < 0:
            raise ConfigError(f"max_draft_tokens is {self.max_draft_tokens}: expected at least 0")

    def exits(self, layers: Iterable[int]) -> list[int]:
        """The exit layers that may draft, shallowest first: those not beyond `max_exit_layer`."""
        return sorted(layer for layer in layers if layer <= self.max_exit_layer)

    def accepts(self, confidence: float) -> bool:
        """Whether a token of this calibrated confidence leaves as a draft. NaN never does."""
        return confidence >= self.exit_threshold

    def draft_limit(self, remaining_tokens: int) -> int:
        """Drafts that a round may make when `remaining_tokens` may still be emitted; verification adds one."""
        return max(0, min(self.max_draft_tokens, remaining_tokens - 1))
