"""When to draft and when to stop: the bounds of SpecBound (arXiv 2604.12247, bounded speculation).

Nothing but comparisons. The runtime, the controller and the replay of logged traces run this same code, so that what
is predicted is what happens. Knows no tensors and no model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import ConfigError
from runtime.fields import shown


@dataclass(frozen=True, slots=True)
class SpeculationBounds:
    """Bounds on drafting.

    Attributes:
        exit_threshold: tau, the confidence in [0, 1] from which a token exits as a draft. Above 1 nothing exits.
        max_exit_layer: the paper's d_max; a token that reaches it without an exit is hard and ends the draft.
        max_draft_tokens: the paper's w_max, drafts in a row before verification.
        exit_thresholds: exit layer -> its own tau, where it is not `exit_threshold`; above 1 the exit is not asked.
        min_survival: no layer runs for a further draft where the product of the drafts' confidences, the chance that
            all of them are accepted, is below this: it would likely be wasted. Depth 0 runs none, and drafts on. At 0
            this never stops anything. (Not in the paper.)
        min_draft_survival: the same for drafts of depth 0, which cost little but a row of verification: below this
            product nothing more is drafted.
    """

    exit_threshold: float
    max_exit_layer: int
    max_draft_tokens: int
    exit_thresholds: Mapping[int, float] = field(default_factory=dict)
    min_survival: float = 0.0
    min_draft_survival: float = 0.0

    def __post_init__(self) -> None:
        for name, threshold in [
            ("exit_threshold", self.exit_threshold),
            *((f"exit_thresholds of layer {layer}", value) for layer, value in self.exit_thresholds.items()),
        ]:
            if not threshold >= 0.0:
                raise ConfigError(f"{name} is {threshold}: expected a number of at least 0")
        if self.max_exit_layer < 0:
            raise ConfigError(f"max_exit_layer is {shown(self.max_exit_layer)}: expected at least 0")
        if self.max_draft_tokens < 0:
            raise ConfigError(f"max_draft_tokens is {shown(self.max_draft_tokens)}: expected at least 0")
        for name, share in (("min_survival", self.min_survival), ("min_draft_survival", self.min_draft_survival)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name} is {share}: expected a number from 0 to 1")

    def threshold(self, layer: int) -> float:
        """Tau of an exit."""
        return self.exit_thresholds.get(layer, self.exit_threshold)

    def exits(self, layers: Iterable[int], survival: float = 1.0) -> list[int]:
        """The exit layers that may draft, shallowest first: not beyond `max_exit_layer`, and with a tau to reach.

        Args:
            survival: product of the confidences of the drafts so far.
        """
        if not self.drafts_on(survival):
            return []
        deepest = self.max_exit_layer if self.runs_layers(survival) else 0
        return sorted(layer for layer in layers if layer <= deepest and self.threshold(layer) <= 1.0)

    def accepts(self, layer: int, confidence: Any) -> Any:
        """Whether a token of this calibrated confidence leaves as a draft. NaN never does. A number or an array."""
        return confidence >= self.threshold(layer)

    def drafts_on(self, survival: float) -> bool:
        """Whether any source is asked for one more draft, given the product of the confidences so far."""
        return survival >= self.min_draft_survival

    def runs_layers(self, survival: float) -> bool:
        """Whether layers run for one more draft; none do where no source is asked."""
        return survival >= max(self.min_survival, self.min_draft_survival)

    def draft_limit(self, remaining_tokens: int) -> int:
        """Drafts that a round may make when so many tokens may still be emitted; verification adds one."""
        return max(0, min(self.max_draft_tokens, remaining_tokens - 1))
