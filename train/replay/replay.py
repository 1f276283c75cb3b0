"""Replay: what a policy would do on logged text, and how fast, without a model.

On a right prefix the log holds what the runtime sees, and the runtime's own policy code decides, so accepted
lengths are those of a run. What follows a wrong draft is not in the log: it only costs time, and is guessed from
the text's own confidences. Knows no model and does not search.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.drafts import Drafting
from train.replay.rounds import Ints, Small


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals of a replay.

    Attributes:
        rounds: verification passes.
        drafted, accepted: drafts by source.
        hard_tokens: rounds that ended at a token no exit was sure of.
        emitted_by_text, ms_by_text, plain_by_text: tokens after the first, their predicted cost, and that of stock
            `generate`, of each text, shape [texts].
    """

    rounds: int
    drafted: Counter[int]
    accepted: Counter[int]
    hard_tokens: int
    emitted_by_text: Ints
    ms_by_text: NDArray[np.float64]
    plain_by_text: NDArray[np.float64]

    @property
    def emitted(self) -> int:
        """Tokens."""
        return int(self.emitted_by_text.sum())

    @property
    def mean_accepted_length(self) -> float:
        """Tokens emitted per verification pass, the bonus counted."""
        return self.emitted / max(1, self.rounds)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.accepted.total() / max(1, self.drafted.total())

    @property
    def ms_per_token(self) -> float:
        """Predicted milliseconds a token."""
        return float(self.ms_by_text.sum()) / max(1, self.emitted)

    @property
    def tokens_per_second(self) -> float:
        """Predicted."""
        return 1000.0 / max(1e-9, self.ms_per_token)

    @property
    def speedup(self) -> float:
        """Predicted, over stock `generate`."""
        return float(self.plain_by_text.sum() / self.ms_by_text.sum())

    def speedup_interval(self, *, level: float = 0.95, draws: int = 1000) -> tuple[float, float]:
        """Bootstrap interval of the speed-up, over texts; nearly the same text twice is one piece of evidence."""
        texts = len(self.ms_by_text)
        chosen = np.random.default_rng(0).integers(texts, size=(draws, texts))
        ratios = self.plain_by_text[chosen].sum(axis=1) / self.ms_by_text[chosen].sum(axis=1)
        low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def describe(self, costs: CostTable) -> dict[str, Any]:
        """As JSON values, for `calibration.json`; `costs` are those it was predicted with."""
        low, high = self.speedup_interval()
        return {
            "mean_accepted_length": self.mean_accepted_length,
            "acceptance_rate": self.acceptance_rate,
            "drafted": {str(layer): count for layer, count in sorted(self.drafted.items())},
            "accepted": {str(layer): count for layer, count in sorted(self.accepted.items())},
            "predicted_speedup": self.speedup,
            "predicted_speedup_interval": [low, high],
            "costs": dict(costs.conditions) or "layer counts, not measured times",
        }


class Replayer:
    """Decodes logged texts under any bounds, fastest under ones that differ from the last in width or survival alone.

    Args:
        traces: what to decode.
        costs: of the machine that the speed is predicted for.
    """

    def __init__(self, traces: Traces, costs: CostTable) -> None:
        self.traces = traces
        self.costs = costs
        self._drafting = Drafting(traces, costs)
        starts = traces.starts
        self._ends = np.append(starts, len(traces))  # where a text ends, the next one starts
        self._emitted = traces.remaining[starts] - 1  # the prompt's own forward emits the first, in both ways
        self._first = starts[self._emitted > 0] + 1
        self._doublings = max(1, int(self._emitted.max()).bit_length())
        plain = costs.plain + costs.plain_context * traces.context
        plain[starts] = 0.0
        self._plain = np.bincount(traces.sequence, weights=plain).astype(np.float64)

    def run(self, bounds: SpeculationBounds) -> Totals:
        """Totals of decoding every text."""
        drafting = self._drafting
        asked = drafting.questions(bounds)
        accepted = np.minimum(drafting.correct, asked)
        starts = self._round_starts(accepted)
        accepted = accepted.take(starts)
        kinds, kind = drafting.kinds, drafting.after[asked.take(starts), starts]
        text, price = self.traces.sequence.take(starts), kinds.ms.take(kind, axis=0)
        ms = price[:, 0] + price[:, 1] * self.traces.context.take(starts) + self.costs.token * accepted
        *drafted, hard_tokens = kinds.totals(kind)
        *correct, _ = kinds.totals(drafting.after[accepted, starts])
        return Totals(
            rounds=len(starts),
            drafted=_by_source(kinds.exits, drafted),
            accepted=_by_source(kinds.exits, correct),
            hard_tokens=hard_tokens,
            emitted_by_text=self._emitted,
            ms_by_text=np.bincount(text, weights=ms, minlength=len(self._plain)).astype(np.float64),
            plain_by_text=self._plain,
        )

    def _round_starts(self, accepted: Small) -> Ints:
        """Positions where a round does start: each text's second, and from there always the one after what was
        emitted, in no order."""
        following = np.arange(1, len(accepted) + 2)
        following[:-1] += accepted
        following[self._ends] = self._ends
        jumps = [following]
        for _ in range(self._doublings - 1):  # each over twice as many rounds
            jumps.append(jumps[-1].take(jumps[-1]))
        found = self._first
        for jump in reversed(jumps):
            further = jump.take(found)
            found = np.concatenate([found, further[following.take(further) != further]])
        return found


def _by_source(exits: Sequence[int], counts: Sequence[int]) -> Counter[int]:
    return Counter({layer: count for layer, count in zip(exits, counts, strict=True) if count})
