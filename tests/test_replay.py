"""Replay: totals against a simulation that goes token by token and layer by layer, and the best bounds."""

import random

import numpy as np
import pytest

from runtime.policy import SpeculationBounds
from train.replay import NO_SPECULATION, LayerCosts, Trace, best_bounds, replay, traces

EXITS, NUM_LAYERS = (2, 3, 5), 6
COSTS = LayerCosts(NUM_LAYERS, head=0.25, unembedding=1.5, extra_row=0.4)


def random_trace(length: int, seed: int) -> Trace:
    numbers = random.Random(seed)
    sure = {layer: [numbers.random() for _ in range(length)] for layer in EXITS}
    right = {layer: [numbers.random() < 0.7 for _ in range(length)] for layer in EXITS}
    return Trace(sure, right)


def constant_trace(length: int, *, sure: float, right: bool) -> Trace:
    return Trace({layer: [sure] * length for layer in EXITS}, {layer: [right] * length for layer in EXITS})


def simulate(trace: Trace, threshold: float, deepest: int, most: int, costs: LayerCosts) -> dict[str, float]:
    """One token and one layer at a time; the text is emitted token by token until none is left."""
    totals = {"emitted": 0, "rounds": 0, "drafted": 0, "accepted": 0, "cost": 0.0}
    text_left = list(range(len(trace)))
    while text_left:
        totals["rounds"] += 1
        reached, drafts = (
            [],
            [],
        )  # layers each row of the round has been through; (position, exit) of each draft
        for position in text_left:
            layer, out = 0, None
            drafting = len(drafts) < most and position != text_left[-1]
            while drafting and layer < deepest and out is None:
                layer += 1
                totals["cost"] += 1
                if layer in EXITS:
                    totals["cost"] += costs.head
                    out = layer if trace.sure[layer][position] >= threshold else None
            # a token goes no further than the deepest exit that was asked
            asked = max((e for e in EXITS if e <= layer), default=0)
            totals["cost"] -= layer - asked
            reached.append(asked)
            if out is None:
                break
            drafts.append((position, out))
        for layer in range(1, NUM_LAYERS + 1):
            rows = sum(depth < layer for depth in reached)
            totals["cost"] += 1 + costs.extra_row * (rows - 1) if rows else 0
        totals["cost"] += costs.unembedding * (1 + costs.extra_row * (len(reached) - 1))
        totals["drafted"] += len(drafts)
        good = 0
        while good < len(drafts) and trace.right[drafts[good][1]][drafts[good][0]]:
            good += 1
        totals["accepted"] += good
        totals["emitted"] += good + 1
        text_left = text_left[good + 1 :]
    return totals


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9, 1.1])
@pytest.mark.parametrize("deepest", [1, 2, 4, 5])
@pytest.mark.parametrize("most", [0, 1, 3, 8])
def test_totals_equal_a_simulation_token_by_token(threshold, deepest, most):
    logged = [random_trace(length, seed) for seed, length in enumerate((1, 2, 9, 40))]
    found = replay(logged, SpeculationBounds(threshold, deepest, most), COSTS)
    single = [simulate(trace, threshold, deepest, most, COSTS) for trace in logged]
    for name in ("emitted", "rounds", "drafted", "accepted", "cost"):
        assert getattr(found, name) == pytest.approx(sum(totals[name] for totals in single)), name
    assert found.emitted == sum(map(len, logged))


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_perfect_drafts_give_the_longest_acceptance(most):
    found = replay([constant_trace(40 * (most + 1), sure=0.99, right=True)], SpeculationBounds(0.5, 5, most), COSTS)
    assert found.mean_accepted_length == most + 1
    assert found.accepted == found.drafted == 40 * most


@pytest.mark.parametrize(("sure", "right"), [(0.1, True), (0.99, False)])
def test_never_sure_and_never_right_emit_one_token_a_round(sure, right):
    found = replay([constant_trace(50, sure=sure, right=right)], SpeculationBounds(0.5, 5, 4), COSTS)
    assert found.mean_accepted_length == 1.0
    assert found.accepted == 0


def test_no_drafts_cost_what_plain_decoding_does():
    found = replay([random_trace(30, 0)], SpeculationBounds(0.0, 5, 0), COSTS)
    assert found.cost == pytest.approx(30 * COSTS.plain)
    assert found.speedup(COSTS) == pytest.approx(1.0)


def test_best_bounds_are_the_fastest_of_the_grid():
    logged = [
        Trace({layer: [0.95] * 60 for layer in EXITS}, {2: [False] * 60, 3: [True] * 60, 5: [True] * 60}),
        random_trace(30, 1),
    ]
    bounds, found = best_bounds(logged, EXITS, COSTS, max_exit_layer=5)
    assert bounds.max_exit_layer == 5
    widths = (1, 2, 3, 4, 6, 8)
    others = [replay(logged, SpeculationBounds(t, 5, w), COSTS) for t in (0.3, 0.5, 0.75, 0.9) for w in widths]
    assert found.speedup(COSTS) >= max(other.speedup(COSTS) for other in others)
    assert found == replay(logged, bounds, COSTS)


def test_good_shallow_drafts_pay():
    bounds, found = best_bounds([constant_trace(90, sure=0.99, right=True)], EXITS, COSTS)
    assert bounds.max_draft_tokens == 8
    assert found.speedup(COSTS) > 1.2


def test_nothing_is_drafted_where_nothing_pays():
    logged = [constant_trace(90, sure=0.99, right=False)]
    bounds, found = best_bounds(logged, EXITS, COSTS)
    assert (bounds.exit_threshold, bounds.max_draft_tokens) == (NO_SPECULATION, 0)
    assert found.drafted == 0
    assert found.speedup(COSTS) == pytest.approx(1.0)


def test_given_bounds_are_held():
    logged = [constant_trace(90, sure=0.99, right=False)]
    bounds, found = best_bounds(logged, EXITS, COSTS, exit_threshold=0.5, max_draft_tokens=3)
    assert (bounds.exit_threshold, bounds.max_draft_tokens) == (0.5, 3)
    assert found.speedup(COSTS) < 1
    refused, _ = best_bounds(logged, EXITS, COSTS, max_draft_tokens=3)
    assert (refused.exit_threshold, refused.max_draft_tokens) == (NO_SPECULATION, 3)


def test_traces_are_cut_at_sequences():
    sequence = np.array([0, 0, 0, 1, 2, 2])
    sure = {2: np.arange(6, dtype=np.float32)}
    right = {2: np.arange(6) % 2 == 0}
    assert traces(sure, right, sequence) == [
        Trace({2: [0.0, 1.0, 2.0]}, {2: [True, False, True]}),
        Trace({2: [3.0]}, {2: [False]}),
        Trace({2: [4.0, 5.0]}, {2: [True, False]}),
    ]
