"""Replay: totals against a simulation that goes token by token and layer by layer."""

import random
from dataclasses import replace

import numpy as np
import pytest

from runtime.drafting.policy import SpeculationBounds
from tests.helpers.replay import COSTS, EXITS, FOLLOWED, random_traces, simulate
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer, Totals
from train.replay.rounds import Level


def check(found: Totals, traces: Traces, bounds: SpeculationBounds) -> None:
    """Against the simulation of every text."""
    single = [simulate(traces, text, bounds, COSTS) for text in range(traces.num_sequences)]
    totals = {name: sum(one[name] for one in single) for name in single[0]}
    assert found.emitted == totals["emitted"] == len(traces) - traces.num_sequences
    assert (found.rounds, found.hard_tokens) == (totals["rounds"], totals["hard"])
    assert (found.drafted.total(), found.accepted.total()) == (totals["drafted"], totals["accepted"])
    assert found.ms_by_text.tolist() == pytest.approx([one["ms"] for one in single], rel=1e-9)
    later = np.setdiff1d(np.arange(len(traces)), traces.starts)
    plain = sum(COSTS.plain + COSTS.plain_context * context for context in traces.context[later])
    assert found.speedup == pytest.approx(plain / totals["ms"])
    assert found.tokens_per_second == pytest.approx(1000 * found.emitted / totals["ms"])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9, 1.1])
@pytest.mark.parametrize("deepest", [0, 1, 2, 5])
@pytest.mark.parametrize("most", [0, 1, 3, 8])
def test_totals_equal_a_simulation_token_by_token(threshold: float, deepest: int, most: int) -> None:
    """With thresholds of their own for some exits and a survival stop, and without."""
    traces = random_traces((1, 2, 9, 40))
    for own, *survival in (({}, 0.0, 0.0), ({2: 0.5, 3: 2.0}, 0.3, 0.02), ({0: 2.0}, 0.05, 0.2), ({}, 0.0, 0.1)):
        bounds = SpeculationBounds(threshold, deepest, most, own, *survival)
        check(Replayer(traces, COSTS).run(bounds), traces, bounds)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("sure", [0.0, 0.5, 1.1])
@pytest.mark.parametrize("most", [1, 4, 15])
def test_trees_equal_a_simulation_node_by_node(branches: int, sure: float, most: int) -> None:
    """Of any width and depth, with prices of rows and heads, and without."""
    traces = random_traces((1, 2, 9, 40), seed=branches)
    for depth, *survival in ((None, 0.0, 0.0), (3, 0.2, 0.05), (2, 0.5, 0.3), (8, 0.0, 0.1)):
        shape = {"max_branches": branches, "max_depth": depth, "sure_threshold": sure}
        bounds = SpeculationBounds(0.3, 5, most, {2: 0.6}, *survival, **shape)
        check(Replayer(traces, COSTS).run(bounds), traces, bounds)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_between_replays_changes_nothing(seed: int) -> None:
    """One replayer for bounds in any order; a confidence that is no number is never sure."""
    numbers = random.Random(seed)
    traces = random_traces((5, 1, 30, 2, 12), seed)
    missing = np.random.default_rng(seed).random(traces.rank.shape) < 0.1
    traces.confidence[np.broadcast_to(missing[:, :, None], traces.confidence.shape)] = np.nan
    replayer = Replayer(traces, COSTS)
    for _ in range(80):
        own = {layer: numbers.choice((0.2, 2.0)) for layer in numbers.sample(EXITS, numbers.choice((0, 0, 1, 2)))}
        threshold, deepest, most = numbers.choice((0.0, 0.4)), numbers.choice((0, 2, 5)), numbers.randrange(9)
        bounds = SpeculationBounds(
            threshold, deepest, most, own, numbers.choice((0.0, 0.1, 0.6, 1.0)), numbers.choice((0.0, 0.1, 0.5))
        )
        check(replayer.run(bounds), traces, bounds)


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_perfect_drafts_give_the_longest_acceptance(most: int) -> None:
    """And never being sure, or never right, gives one token a round."""
    length = 40 * (most + 1) + 1
    traces = random_traces((length,))
    traces.confidence[:, :, 0] = 0.99
    perfect = replace(traces, rank=np.zeros_like(traces.rank), shared=np.zeros_like(traces.rank), after_wrong=None)
    found = Replayer(perfect, COSTS).run(SpeculationBounds(0.5, 5, most))
    assert found.mean_accepted_length == most + 1 and found.acceptance_rate == 1.0
    assert found.drafted == {0: 40 * most}
    wrong = replace(perfect, rank=perfect.rank - 1)
    assert Replayer(wrong, COSTS).run(SpeculationBounds(0.5, 5, most)).mean_accepted_length == 1.0
    assert Replayer(perfect, COSTS).run(SpeculationBounds(0.995, 5, most)).drafted.total() == 0


def test_the_interval_is_of_texts() -> None:
    """It holds the estimate, is narrower for more texts, and comes out the same again."""
    bounds = SpeculationBounds(0.4, 5, 4)
    random.seed(0)

    def width(found: Totals) -> float:
        low, high = found.speedup_interval()
        assert low <= found.speedup <= high
        return high - low

    few, many = (Replayer(random_traces((30,) * texts, seed=2), COSTS).run(bounds) for texts in (4, 60))
    assert width(many) < width(few)
    assert few.speedup_interval() == few.speedup_interval()


def test_a_round_is_priced_as_its_docstring_says() -> None:
    """Exits at 2 and 4 of 6 layers; the root, a level of three, a last draft; a layer of w tokens costs 10^(w - 1)."""
    powers = {width: 10.0 ** (width - 1) for width in range(1, 6)}
    costs = CostTable(
        6, powers, dict.fromkeys(powers, 0.5), {1: 0.0, 5: 0.1}, 1000.0, 0.0, 0.01, 1.0, 0.0, round=0.02, head_row=3.0
    )
    levels = (Level(1, 0, ((2, 1),)), Level(3, 0, ((2, 3), (4, 1))))
    ms, of_context = costs.of_round(levels, 1)
    heads = 3 * 1000 + 2 * 3.0
    assert ms == pytest.approx(0.02 + 0.01 + 0.1 + heads + 2 * 1 + 2 * 100 + 2 * 1000 + 4 * 1 + 2 * 10_000)
    assert of_context == pytest.approx(0.5 * 12)
    assert costs.of_round((), 1) == (pytest.approx(0.03 + 6), pytest.approx(3.0))
    assert costs.of_round((), 1, 3) == (pytest.approx(0.02 + 0.03 + 0.05 + 6 * 100), pytest.approx(9.0))
    ms, of_context = costs.of_round(levels[:1], 1, 2)
    assert ms == pytest.approx(0.02 + 0.02 + 0.075 + 2 * 10 + 1000 + 3 + 2 * 10 + 4 * 1000)
    assert of_context == pytest.approx(0.5 * 16)


def test_rounds_may_be_wider_than_what_was_logged() -> None:
    """More drafts than ages, followed copies and measured widths: the last of each stands for all further ones."""
    perfect = random_traces((101,))
    perfect.confidence[:, :, 0] = 1
    perfect.rank[:] = perfect.shared[:] = 0
    assert Replayer(perfect, COSTS).run(SpeculationBounds(0.5, 5, 49)).rounds == 2
    perfect.rank[:, :, 1] = -1  # the round that starts there goes on to copy, which nothing accepts
    perfect.after_wrong[:] = 1
    replayed = Replayer(perfect, COSTS).run(SpeculationBounds(0.0, 0, 49))
    assert (replayed.rounds, replayed.drafted[0]) == (3, 1 + FOLLOWED + 49 + 48)
