"""Random traces, and a simulation of rounds on them that goes token by token and layer by layer."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from runtime.drafting.branches import Branch, merge
from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import Traces
from train.replay.costs import CostTable

EXITS, NUM_LAYERS = (0, 2, 3, 5), 6
WIDTHS = range(1, 18)
DRAFTS = 3  # distances from the root that are told apart: the first, the second, any other
BRANCHES = 3  # drafts of a head at a position
FOLLOWED = 4  # drafts of the lookup behind a wrong one of its own
COSTS = CostTable(
    num_hidden_layers=NUM_LAYERS,
    layer={width: 1.0 + 0.4 * (width - 1) for width in WIDTHS},
    layer_context={width: 0.001 * width for width in WIDTHS},
    unembedding={width: 1.5 + 0.1 * width for width in WIDTHS},
    head=0.25,
    head_row=0.07,
    lookup=0.03,
    token=0.2,
    round=0.3,
    plain=9.0,
    plain_context=0.002,
)


def random_traces(lengths: tuple[int, ...], seed: int = 0, prompt: int = 7) -> Traces:
    numbers = np.random.default_rng(seed)
    total = sum(lengths)
    shape = (len(EXITS), DRAFTS, total)
    confidence = -np.sort(-numbers.random((len(EXITS), DRAFTS, BRANCHES, total), dtype=np.float32), axis=2)
    confidence[0, :, 1:] = 0.0  # the lookup proposes one token
    shared = numbers.integers(-1, BRANCHES, shape).astype(np.int8)
    shared[0] = 0
    other = numbers.integers(-1, BRANCHES, shape).astype(np.int8)
    other[other == shared] = -1
    other[0] = -1
    known = numbers.random(shape[1:]) < 0.5  # the lookup is right
    return Traces(
        layers=EXITS,
        confidence=confidence,
        rank=np.where(known, shared, other),
        shared=shared,
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
        good = max(len(node.way) for node in simulated.nodes if node.accepted)
        totals["ms"] += simulated.ms + costs.unembedding[len(simulated.nodes)] + costs.round + costs.token * (good + 1)
        totals["rounds"] += 1
        totals["hard"] += simulated.hard
        totals["drafted"] += len(simulated.nodes) - 1
        totals["accepted"] += good
        totals["emitted"] += good + 1
        left = left[good + 1 :]
    return totals


@dataclass
class SimulatedNode:
    """A pending token: the drafts on the way to it, whether it is accepted, and where the lookup went wrong."""

    way: tuple[Hashable, ...] = ()
    chance: float = 1.0
    accepted: bool = True
    wrong: int | None = None
    depth: int = 0


@dataclass
class SimulatedRound:
    """One round, one token and one layer at a time.

    Attributes:
        context: tokens before the round.
        nodes: the pending tokens.
        hard: whether no source was confident enough at the end.
        ms: spent so far.
    """

    traces: Traces
    bounds: SpeculationBounds
    costs: CostTable
    context: int
    nodes: list[SimulatedNode] = field(default_factory=lambda: [SimulatedNode()])
    hard: bool = False
    ms: float = 0.0

    def climb(self, to: int) -> None:
        """Bring every pending token to a depth, layer by layer."""
        for layer in range(to):
            rows = [node for node in self.nodes if node.depth == layer]
            if rows:
                self.ms += self.costs.layer[len(rows)] + self.costs.layer_context[len(rows)] * self.context
            for node in rows:
                node.depth += 1

    def draft(self, left: list[int]) -> None:
        """Draft level by level, until a bound stops it."""
        bounds, level = self.bounds, self.nodes
        most = bounds.max_draft_tokens if bounds.max_depth is None else bounds.max_depth
        for distance, position in enumerate(left[:-1][:most]):
            room = bounds.max_draft_tokens + 1 - len(self.nodes)
            if room <= 0 or not level:
                return
            made = self.ask(level, position, min(distance, DRAFTS - 1))
            self.hard = not any(made.values())
            drafts = [
                (level[number].chance * branch.confidence, level[number], branch)
                for number, branches in made.items()
                for branch in branches[: bounds.max_branches]
            ]
            drafts = sorted((one for one in drafts if one[0] >= bounds.min_draft_survival), key=lambda one: -one[0])
            level = [self.follow(*one, position, min(distance, DRAFTS - 1)) for one in drafts[:room]]
            self.nodes = [*self.nodes, *level]

    def follow(self, chance: float, node: SimulatedNode, branch: Branch, at: int, age: int) -> SimulatedNode:
        """The draft as a pending token."""
        traces, chosen = self.traces, False
        if branch.token == "lookup":
            chosen = bool(traces.rank[0, age, at] == 0)
        elif isinstance(branch.token, tuple):
            layer, place = branch.token
            chosen = bool(traces.rank[EXITS.index(layer), age, at] == place)
        wrong = node.wrong if branch.token == "copied" else None
        if branch.token == "lookup" and not chosen and traces.after_wrong is not None:
            wrong = at
        return SimulatedNode((*node.way, branch.token), chance, node.accepted and chosen, wrong)

    def ask(self, level: list[SimulatedNode], position: int, age: int) -> dict[int, list[Branch]]:
        """What each node's sources propose, the first that is sure being the last that is asked."""
        bounds, found = self.bounds, {number: list[Branch]() for number in range(len(level))}
        still = set(found)
        for layer in EXITS:
            if layer > bounds.max_exit_layer or bounds.threshold(layer) > 1:
                continue
            asked = [number for number in sorted(still) if layer == 0 or level[number].chance >= bounds.min_survival]
            if not asked:
                continue
            self.climb(layer)
            costs = self.costs
            self.ms += costs.lookup * len(asked) if layer == 0 else costs.head + costs.head_row * (len(asked) - 1)
            for number in asked:
                proposals = self.proposals(layer, position, age, level[number].wrong)[: bounds.max_branches]
                if proposals and proposals[0][1] >= bounds.threshold(layer):
                    found[number] = merge(found[number], proposals, layer)
                    if found[number][0].confidence >= bounds.sure_threshold:
                        still.remove(number)
        return found

    def proposals(self, layer: int, position: int, age: int, wrong: int | None) -> list[tuple[Hashable, float]]:
        """Those of the log; of the lookup behind a wrong draft of its own, what it goes on to copy."""
        if layer == 0 and wrong is not None:
            assert self.traces.after_wrong is not None
            behind = position - wrong - 1
            return [("copied", float(self.traces.after_wrong[behind, wrong]))] if behind < FOLLOWED else []
        index = EXITS.index(layer)
        shared = self.traces.shared[index, age, position]
        confidences = [float(one) for one in self.traces.confidence[index, age, :, position]]
        return [
            ("lookup" if place == shared else (layer, place), one) for place, one in enumerate(confidences) if one > 0
        ]
