"""Replay: totals against a simulation that goes token by token and layer by layer, and against the runtime itself."""

import random

import numpy as np
import pytest

from runtime.drafting.policy import SpeculationBounds
from tests.helpers.traces import COSTS, DRAFTS, EXITS, FOLLOWED, NUM_LAYERS, random_traces
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer, Totals


def climb(depth: list[int], to: int, context: int, costs: CostTable) -> float:
    """Bring every pending token to a depth, layer by layer; what that costs."""
    ms = 0.0
    for layer in range(to):
        rows = sum(reached == layer for reached in depth)
        if rows:
            ms += costs.layer[rows] + costs.layer_context[rows] * context
        depth[:] = [reached + (reached == layer) for reached in depth]
    return ms


def simulate(traces: Traces, text: int, bounds: SpeculationBounds, costs: CostTable) -> dict[str, float]:
    """One token and one layer at a time; the text is emitted token by token until none is left."""
    totals = {"emitted": 0, "rounds": 0, "drafted": 0, "accepted": 0, "hard": 0, "ms": 0.0}
    left = np.flatnonzero(traces.sequence == text).tolist()[1:]  # the prompt's own forward emits the first
    exits = [e for e in EXITS if e <= bounds.max_exit_layer and bounds.threshold(e) <= 1]
    while left:
        context = traces.context[left[0]]
        depth: list[int] = []
        drafts: list[tuple[int, int, int]] = []
        survival, hard = 1.0, False
        wrong: int | None = None  # where a draft by lookup was wrong, since when it copies from the wrong place

        for position in left:
            depth.append(0)
            if len(drafts) >= bounds.max_draft_tokens or position == left[-1]:
                break
            out = None
            for layer in exits if survival >= bounds.min_draft_survival else []:
                stopped = survival < bounds.min_survival
                if layer > 0 and stopped:
                    break
                confidence = traces.confidence[EXITS.index(layer), min(len(drafts), DRAFTS - 1), position]
                if layer == 0 and wrong is not None:
                    assert traces.after_wrong is not None
                    behind = position - wrong - 1
                    confidence = traces.after_wrong[behind, wrong] if behind < FOLLOWED else np.float32(0)
                # a stopped lookup's last question is not priced
                if not stopped or confidence >= bounds.threshold(layer):
                    totals["ms"] += climb(depth, layer, context, costs)
                    totals["ms"] += costs.lookup if layer == 0 else costs.head
                if confidence >= bounds.threshold(layer):
                    out = layer
                    break
            if out is None:
                hard = survival >= max(bounds.min_survival, bounds.min_draft_survival)
                break
            drafts.append((EXITS.index(out), min(len(drafts), DRAFTS - 1), position))
            survival *= float(confidence)
            if out > 0 or traces.after_wrong is None:
                wrong = None
            elif wrong is None and not traces.correct[drafts[-1]]:
                wrong = position
        totals["ms"] += climb(depth, NUM_LAYERS, context, costs)
        good = 0
        while good < len(drafts) and traces.correct[drafts[good]]:
            good += 1
        totals["ms"] += costs.unembedding[len(depth)] + costs.round + costs.token * (good + 1)
        totals["rounds"] += 1
        totals["hard"] += hard
        totals["drafted"] += len(drafts)
        totals["accepted"] += good
        totals["emitted"] += good + 1
        left = left[good + 1 :]
    return totals


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


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_between_replays_changes_nothing(seed: int) -> None:
    """One replayer for bounds in any order; a confidence that is no number is never sure."""
    numbers = random.Random(seed)
    traces = random_traces((5, 1, 30, 2, 12), seed)
    traces.confidence[np.random.default_rng(seed).random(traces.confidence.shape) < 0.1] = np.nan
    replayer = Replayer(traces, COSTS)
    for _ in range(80):
        own = {layer: numbers.choice((0.2, 2.0)) for layer in numbers.sample(EXITS, numbers.choice((0, 0, 1, 2)))}
        threshold, deepest, most = numbers.choice((0.0, 0.4)), numbers.choice((0, 2, 5)), numbers.randrange(9)
        bounds = SpeculationBounds(
            threshold, deepest, most, own, numbers.choice((0.0, 0.1, 0.6, 1.0)), numbers.choice((0.0, 0.1, 0.5))
        )
        check(replayer.run(bounds), traces, bounds)
