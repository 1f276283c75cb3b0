"""Replay: what a policy would do on logged text, without a model.

The cache of a right prefix is exact, so confidences logged on plain text are those the runtime would see, and
its own policy code on them makes its own decisions. What follows a wrong draft is not in the log; only its
cost is guessed, from the text's own confidences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from runtime.policy import SpeculationBounds

THRESHOLDS = (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
WIDTHS = (1, 2, 3, 4, 6, 8)
NO_SPECULATION = 2.0


@dataclass(frozen=True, slots=True)
class Trace:
    """One text: confidence and correctness of each exit's draft at each of its positions.

    Attributes:
        sure: exit layer -> calibrated confidences, one a position.
        right: exit layer -> whether the draft is the base's choice.
    """

    sure: Mapping[int, Sequence[float]]
    right: Mapping[int, Sequence[bool]]

    def __len__(self) -> int:
        return len(next(iter(self.sure.values())))


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Rough costs in units of one decoder layer run on one token. (A measured table says more.)

    Attributes:
        num_hidden_layers: L.
        head: one exit head on one token.
        unembedding: the base's unembedding on one token.
        extra_row: each further token of a block, as a share of the first.
    """

    num_hidden_layers: int
    head: float
    unembedding: float
    extra_row: float = 0.15

    @property
    def plain(self) -> float:
        """One token of plain decoding."""
        return self.num_hidden_layers + self.unembedding


@dataclass(slots=True)
class Replayed:
    """Totals of a replay; `cost` in layer units."""

    emitted: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    cost: float = 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens emitted per verification pass, the bonus counted."""
        return self.emitted / max(1, self.rounds)

    def speedup(self, costs: LayerCosts) -> float:
        """Over plain decoding of the same text."""
        return self.emitted * costs.plain / self.cost if self.cost else 1.0


def traces(
    sure: Mapping[int, NDArray[np.float32]],
    right: Mapping[int, NDArray[np.bool_]],
    sequence: NDArray[np.int64],
) -> list[Trace]:
    """One trace a sequence, from arrays over all positions."""
    edges = np.flatnonzero(np.diff(sequence)) + 1
    split_sure = {layer: np.split(values, edges) for layer, values in sure.items()}
    split_right = {layer: np.split(values, edges) for layer, values in right.items()}
    return [
        Trace(
            {layer: parts[index].tolist() for layer, parts in split_sure.items()},
            {layer: parts[index].tolist() for layer, parts in split_right.items()},
        )
        for index in range(len(edges) + 1)
    ]


def replay(logged: Sequence[Trace], bounds: SpeculationBounds, costs: LayerCosts) -> Replayed:
    """Totals of decoding every trace under these bounds."""
    total = Replayed()
    for trace in logged:
        position = 0
        while position < len(trace):
            position += _round(trace, position, bounds, costs, total)
    return total


def _round(trace: Trace, newest: int, bounds: SpeculationBounds, costs: LayerCosts, total: Replayed) -> int:
    """One round from the token at `newest`; tokens emitted."""
    exits = bounds.exits(trace.sure)
    limit = bounds.draft_limit(len(trace) - newest)
    depths: list[int] = []
    accepted, right = 0, True
    for position in range(newest, newest + limit):
        layer = next((layer for layer in exits if bounds.accepts(trace.sure[layer][position])), None)
        asked = [other for other in exits if layer is None or other <= layer]
        total.cost += costs.head * sum(other > 0 for other in asked)
        if layer is None:
            depths.append(asked[-1] if asked else 0)
            break
        depths.append(layer)
        right = right and trace.right[layer][position]
        accepted += right
        total.drafted += 1
    else:
        depths.append(0)
    total.cost += _passes(depths, costs)
    total.accepted += accepted
    total.rounds += 1
    total.emitted += accepted + 1
    return accepted + 1


def _passes(depths: list[int], costs: LayerCosts) -> float:
    """Cost of bringing tokens from where they left to the top, the rows below having been run one by one."""
    rows = len(depths)
    alone = sum(depths)
    levels = sorted({*depths, costs.num_hidden_layers})
    cost, previous = float(alone), 0
    for level in levels:
        lacking = sum(depth <= previous for depth in depths)
        if lacking:
            cost += (level - previous) * (1 + costs.extra_row * (lacking - 1))
        previous = level
    return cost + costs.unembedding * (1 + costs.extra_row * (rows - 1))


def best_bounds(
    logged: Sequence[Trace],
    exit_layers: Sequence[int],
    costs: LayerCosts,
    *,
    exit_threshold: float | None = None,
    max_exit_layer: int | None = None,
    max_draft_tokens: int | None = None,
) -> tuple[SpeculationBounds, Replayed]:
    """The bounds of the fastest replay, those given held fixed; ties go to the smaller bounds.

    Where nothing beats plain decoding the threshold is above 1 and, unless given, no drafts are allowed: no
    head runs. A threshold that is given is kept, whatever it costs.
    """
    grid = product(
        THRESHOLDS if exit_threshold is None else (exit_threshold,),
        exit_layers if max_exit_layer is None else (max_exit_layer,),
        WIDTHS if max_draft_tokens is None else (max_draft_tokens,),
    )
    points = [SpeculationBounds(*point) for point in grid]
    found = [(bounds, replay(logged, bounds, costs)) for bounds in tqdm(points, "bounds", unit="replay")]
    bounds, result = max(found, key=lambda pair: pair[1].speedup(costs))
    if result.speedup(costs) <= 1.0 and exit_threshold is None:
        bounds = SpeculationBounds(NO_SPECULATION, bounds.max_exit_layer, max_draft_tokens or 0)
        return bounds, replay(logged, bounds, costs)
    return bounds, result
