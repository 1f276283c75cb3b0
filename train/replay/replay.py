"""Replay: what a policy would do on logged text, and how fast, without a model.

On an accepted prefix the log holds what the runtime sees, and the runtime's own policy code decides, so accepted
lengths equal those of a run, but where a round comes to its limit of drafts. What follows a wrong draft is not in the
log. It only costs time, which is estimated with what is logged on the text itself. Needs no model and does not search.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.rounds import LoggedRounds, Round, TraceLists


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals of a replay.

    Attributes:
        rounds: verify passes.
        drafted, accepted: drafts by source.
        hard_tokens: rounds that ended at a token for which no source was confident enough.
        emitted_by_text, ms_by_text, plain_by_text: tokens of each text after its first, their predicted cost, and that
            of stock `generate`, shape [texts].
    """

    rounds: int
    drafted: Counter[int]
    accepted: Counter[int]
    hard_tokens: int
    emitted_by_text: NDArray[np.int64]
    ms_by_text: NDArray[np.float64]
    plain_by_text: NDArray[np.float64]

    @property
    def emitted(self) -> int:
        """Tokens emitted, without the first of each text."""
        return int(self.emitted_by_text.sum())

    @property
    def mean_accepted_length(self) -> float:
        """Tokens emitted per verify pass, the bonus token included."""
        return self.emitted / max(1, self.rounds)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.accepted.total() / max(1, self.drafted.total())

    @property
    def ms_per_token(self) -> float:
        """Predicted milliseconds per token."""
        return float(self.ms_by_text.sum()) / max(1, self.emitted)

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second."""
        return 1000.0 / max(1e-9, self.ms_per_token)

    @property
    def speedup(self) -> float:
        """Predicted speed-up over stock `generate`."""
        return float(self.plain_by_text.sum() / self.ms_by_text.sum())

    def speedup_interval(self, *, level: float = 0.95, draws: int = 1000) -> tuple[float, float]:
        """Bootstrap interval of the speed-up; whole texts are resampled, since tokens of one text are dependent."""
        texts = len(self.ms_by_text)
        chosen = np.random.default_rng(0).integers(texts, size=(draws, texts))
        ratios = self.plain_by_text[chosen].sum(axis=1) / self.ms_by_text[chosen].sum(axis=1)
        low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def describe(self, costs: CostTable) -> dict[str, Any]:
        """Figures as JSON values for `calibration.json`; `costs` is the table they were predicted with."""
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
    """Decodes logged texts under any bounds, round after round.

    Args:
        traces: what to decode.
        costs: of the machine that the speed is predicted for.
        requests: that decode together, each its own text, in rounds like one another: what a round costs is then a
            request's share of it, and so is what `Totals` tells.
    """

    def __init__(self, traces: Traces, costs: CostTable, requests: int = 1) -> None:
        self.traces = traces
        self.costs = costs
        self.requests = requests
        self._lists = TraceLists(traces)
        self._context = traces.context.tolist()
        self._cost = cache(costs.of_round)  # few kinds of rounds make up a text
        starts = traces.starts
        self._ends = [*starts[1:].tolist(), len(traces)]
        self._starts = starts.tolist()
        self._emitted = traces.remaining[starts] - 1  # prefill emits the first, with or without drafts
        plain = costs.plain + costs.plain_context * traces.context
        plain[starts] = 0.0
        self._plain = np.bincount(traces.sequence, weights=plain).astype(np.float64)

    def run(self, bounds: SpeculationBounds, rows: int | None = None) -> Totals:
        """Decode every text and return the totals.

        Args:
            rows: of a round of several requests, as `SpeculationBounds.among` takes them.
        """
        logged = LoggedRounds(self._lists, bounds.among(self.requests, rows))
        rounds: list[Round] = []
        ms_by_text = []
        for start, end in zip(self._starts, self._ends, strict=True):
            position, ms = start + 1, 0.0
            while position < end:
                one = logged.at(position, end - position)
                fixed, of_context = self._cost(one.levels, one.last, self.requests)
                shared = fixed + of_context * self._context[position]
                ms += shared / self.requests + self.costs.token * len(one.accepted)
                rounds.append(one)
                position += len(one.accepted) + 1
            ms_by_text.append(ms)
        return Totals(
            rounds=len(rounds),
            drafted=Counter(layer for one in rounds for layer in one.drafted),
            accepted=Counter(layer for one in rounds for layer in one.accepted),
            hard_tokens=sum(one.hard for one in rounds),
            emitted_by_text=self._emitted,
            ms_by_text=np.array(ms_by_text),
            plain_by_text=self._plain,
        )
