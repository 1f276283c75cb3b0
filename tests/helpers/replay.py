"""Random traces, and a simulation of rounds on them that goes token by token and layer by layer."""

from dataclasses import dataclass, field

import numpy as np

from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import Traces
from train.replay.costs import CostTable

EXITS, NUM_LAYERS = (0, 2, 3, 5), 6
WIDTHS = range(1, 10)
DRAFTS = 3  # kinds of drafts in a round: the first, the second, any other
FOLLOWED = 4  # drafts of the lookup behind a wrong one of its own
COSTS = CostTable(
    num_hidden_layers=NUM_LAYERS,
    layer={width: 1.0 + 0.4 * (width - 1) for width in WIDTHS},
    layer_context={width: 0.001 * width for width in WIDTHS},
    unembedding={width: 1.5 + 0.1 * width for width in WIDTHS},
    head=0.25,
    lookup=0.03,
    token=0.2,
    round=0.3,
    plain=9.0,
    plain_context=0.002,
)


def random_traces(lengths: tuple[int, ...], seed: int = 0, prompt: int = 7) -> Traces:
    numbers = np.random.default_rng(seed)
    total = sum(lengths)
    return Traces(
        layers=EXITS,
        confidence=numbers.random((len(EXITS), DRAFTS, total), dtype=np.float32),
        correct=numbers.random((len(EXITS), DRAFTS, total)) < 0.7,
        sequence=np.repeat(np.arange(len(lengths)), lengths),
        context=np.concatenate([prompt + np.arange(length) for length in lengths]),
        after_wrong=numbers.random((FOLLOWED, total), dtype=np.float32),
    )


def simulate(traces: Traces, text: int, bounds: SpeculationBounds, costs: CostTable) -> dict[str, float]:
    """Totals of a text that is emitted token by token until none is left."""
    totals = {"emitted": 0, "rounds": 0, "drafted": 0, "accepted": 0, "hard": 0, "ms": 0.0}
    left = np.flatnonzero(traces.sequence == text).tolist()[1:]  # the prompt's own forward emits the first
    while left:
        simulated = SimulatedRound(traces, bounds, costs, context=int(traces.context[left[0]]))
        simulated.draft(left)
        simulated.climb(NUM_LAYERS)
        good = 0
        while good < len(simulated.drafts) and traces.correct[simulated.drafts[good]]:
            good += 1
        totals["ms"] += simulated.ms + costs.unembedding[len(simulated.depth)] + costs.round + costs.token * (good + 1)
        totals["rounds"] += 1
        totals["hard"] += simulated.hard
        totals["drafted"] += len(simulated.drafts)
        totals["accepted"] += good
        totals["emitted"] += good + 1
        left = left[good + 1 :]
    return totals


@dataclass
class SimulatedRound:
    """One round, one token and one layer at a time.

    Attributes:
        context: tokens before the round.
        depth: layers that each pending token has gone through.
        drafts: where each draft stands in the traces: source, age and position.
        survival: product of the confidences of the drafts.
        wrong: where a draft by lookup was wrong, since when it copies from the wrong place.
        hard: whether no source was confident enough.
        ms: spent so far.
    """

    traces: Traces
    bounds: SpeculationBounds
    costs: CostTable
    context: int
    depth: list[int] = field(default_factory=list)
    drafts: list[tuple[int, int, int]] = field(default_factory=list)
    survival: float = 1.0
    wrong: int | None = None
    hard: bool = False
    ms: float = 0.0

    def climb(self, to: int) -> None:
        """Bring every pending token to a depth, layer by layer."""
        for layer in range(to):
            rows = sum(reached == layer for reached in self.depth)
            if rows:
                self.ms += self.costs.layer[rows] + self.costs.layer_context[rows] * self.context
            self.depth = [reached + (reached == layer) for reached in self.depth]

    def draft(self, left: list[int]) -> None:
        """Draft at one position after the other, until a bound stops it."""
        bounds = self.bounds
        for position in left:
            self.depth.append(0)
            if len(self.drafts) >= bounds.max_draft_tokens or position == left[-1]:
                return
            found = self.ask(position)
            if found is None:
                self.hard = self.survival >= max(bounds.min_survival, bounds.min_draft_survival)
                return
            layer, confidence = found
            self.drafts.append((EXITS.index(layer), min(len(self.drafts), DRAFTS - 1), position))
            self.survival *= confidence
            if layer > 0 or self.traces.after_wrong is None:
                self.wrong = None
            elif self.wrong is None and not self.traces.correct[self.drafts[-1]]:
                self.wrong = position

    def ask(self, position: int) -> tuple[int, float] | None:
        """The first source that is confident enough, and its confidence."""
        bounds, stopped = self.bounds, self.survival < self.bounds.min_survival
        exits = [layer for layer in EXITS if layer <= bounds.max_exit_layer and bounds.threshold(layer) <= 1]
        for layer in exits if self.survival >= bounds.min_draft_survival else []:
            if layer > 0 and stopped:
                return None
            confidence = self.confidence(layer, position)
            if not stopped or confidence >= bounds.threshold(layer):  # a stopped lookup's last question is not priced
                self.climb(layer)
                self.ms += self.costs.lookup if layer == 0 else self.costs.head
            if confidence >= bounds.threshold(layer):
                return layer, float(confidence)
        return None

    def confidence(self, layer: int, position: int) -> np.float32:
        """That of the log, and of the lookup behind a wrong draft of its own what it goes on to copy."""
        if layer == 0 and self.wrong is not None:
            assert self.traces.after_wrong is not None
            behind = position - self.wrong - 1
            return self.traces.after_wrong[behind, self.wrong] if behind < FOLLOWED else np.float32(0)
        return self.traces.confidence[EXITS.index(layer), min(len(self.drafts), DRAFTS - 1), position]
