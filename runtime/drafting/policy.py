"""When to draft and when to stop: the bounds of SpecBound (arXiv 2604.12247, bounded speculation), for draft trees.

Nothing but comparisons. The runtime, the controller and the replay of logged traces run this same code, so that what
is predicted is what happens. Knows no tensors and no model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.errors import ConfigError
from runtime.fields import shown

# Rows of a round that drafts, of all requests together, and a request's share of them at least. Beyond, asking the
# heads costs more than their drafts give: docs/benchmark.md, several requests.
MAX_ROWS, FEWEST_ROWS = 16, 3
MOST_REQUESTS = MAX_ROWS // FEWEST_ROWS  # that draft where they decode together


def widths(requests: int) -> list[int]:
    """Rows that a round of so many requests may have if it drafts, the most first; none where no round should.

    Half of the rows give each request fewer drafts, and are far cheaper on some machines.
    """
    if MAX_ROWS // requests < FEWEST_ROWS:
        return []
    return [rows for rows in (MAX_ROWS, MAX_ROWS // 2) if rows >= 2 * requests]


@dataclass(frozen=True, slots=True)
class SpeculationBounds:
    """Bounds on drafting.

    A round drafts a tree, level by level: the newest token is its root, each draft follows its parent. The path chance
    of a draft is the product of the confidences on the way to it: the chance that it is accepted. (The tree and its
    bounds are not in the paper, whose drafts are a chain: `max_branches` 1.)

    Attributes:
        exit_threshold: tau, the confidence in [0, 1] from which a token exits as a draft. Above 1 nothing exits.
        max_exit_layer: the paper's d_max; a token that reaches it without an exit is hard: nothing follows it.
        max_draft_tokens: the paper's w_max: drafts of a round, those of all paths together.
        exit_thresholds: exit layer -> its own tau, where it is not `exit_threshold`; above 1 the exit is not asked.
        min_survival: no head is asked at a draft whose path chance is below this: its work would likely be wasted.
            Depth 0 runs no layers, and drafts on. At 0 this never stops anything.
        min_draft_survival: the price of a row: a draft whose path chance is below this is not made.
        max_branches: drafts that may follow one token. With 1 the tree is a chain.
        max_depth: drafts on one path; None for as many as `max_draft_tokens`.
        sure_threshold: where a source is as confident as this, no further source is asked at the token; where it is
            less, the next one is asked as well, and the drafts of both follow the token. At 0 the first source that
            reaches its tau is the only one.
    """

    exit_threshold: float
    max_exit_layer: int
    max_draft_tokens: int
    exit_thresholds: Mapping[int, float] = field(default_factory=dict)
    min_survival: float = 0.0
    min_draft_survival: float = 0.0
    max_branches: int = 1
    max_depth: int | None = None
    sure_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name, threshold in [
            ("exit_threshold", self.exit_threshold),
            ("sure_threshold", self.sure_threshold),
            *((f"exit_thresholds of layer {layer}", value) for layer, value in self.exit_thresholds.items()),
        ]:
            if not threshold >= 0.0:
                raise ConfigError(f"{name} is {threshold}: expected a number of at least 0")
        depth = 0 if self.max_depth is None else self.max_depth
        for name, number, least in (
            ("max_exit_layer", self.max_exit_layer, 0),
            ("max_draft_tokens", self.max_draft_tokens, 0),
            ("max_branches", self.max_branches, 1),
            ("max_depth", depth, 0),
        ):
            if number < least:
                raise ConfigError(f"{name} is {shown(number)}: expected at least {least}")
        for name, share in (("min_survival", self.min_survival), ("min_draft_survival", self.min_draft_survival)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name} is {share}: expected a number from 0 to 1")

    def among(self, requests: int, rows: int | None = None) -> "SpeculationBounds":
        """A request's bounds where so many decode together: its share of the rows; alone these.

        Args:
            rows: of the round, one of `widths`; by default the most.
        """
        if requests == 1:
            return self
        most = max(widths(requests), default=0) if rows is None else rows
        return replace(self, max_draft_tokens=min(self.max_draft_tokens, max(0, most // requests - 1)))

    def threshold(self, layer: int) -> float:
        """Tau of an exit."""
        return self.exit_thresholds.get(layer, self.exit_threshold)

    def exits(self, layers: Iterable[int]) -> list[int]:
        """The exit layers that may draft, shallowest first: not beyond `max_exit_layer`, and with a tau to reach."""
        return sorted(layer for layer in layers if layer <= self.max_exit_layer and self.threshold(layer) <= 1.0)

    def accepts(self, layer: int, confidence: Any) -> Any:
        """Whether a token of this calibrated confidence leaves as a draft. NaN never does. A number or an array."""
        return confidence >= self.threshold(layer)

    def is_sure(self, confidence: float) -> bool:
        """Whether no further source is asked, given the confidence of one that drafts."""
        return confidence >= self.sure_threshold

    def asks(self, layer: int, chance: float) -> bool:
        """Whether an exit is asked at a token with this path chance."""
        return layer == 0 or chance >= self.min_survival

    def drafts(self, chance: float) -> bool:
        """Whether a draft with this path chance is made."""
        return chance >= self.min_draft_survival

    def draft_limit(self, remaining_tokens: int) -> int:
        """Drafts that a round may make when so many tokens may still be emitted; none where verification is enough."""
        return self.max_draft_tokens if self.depth_limit(remaining_tokens) else 0

    def depth_limit(self, remaining_tokens: int) -> int:
        """Drafts that one path may have when so many tokens may still be emitted; verification adds one."""
        deepest = self.max_draft_tokens if self.max_depth is None else min(self.max_depth, self.max_draft_tokens)
        return max(0, min(deepest, remaining_tokens - 1))
