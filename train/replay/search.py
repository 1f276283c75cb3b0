"""Finds the bounds that are fastest by replay on one machine. Needs no model: traces and a cost table are enough.

There are too many combinations of all settings to try. So the search starts from a coarse grid, twice: from the best
bounds that ask a head, and from the best that ask none. From there it varies one setting at a time, including each
exit's own threshold and the survival stop, as long as that helps.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
from tqdm import tqdm

from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer, Totals

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WIDTHS = (1, 2, 3, 4, 6, 8, 10, 12, 15)
SURVIVALS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
DRAFT_SURVIVALS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5)
SURE = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.1)
# The coarse grid: of chains, and of trees with these prices of a row and sureness.
QUICK_THRESHOLDS, QUICK_WIDTHS, QUICK_SURVIVALS = (0.1, 0.2, 0.4, 0.6), (2, 4, 12), (0.0, 0.6)
TREE_PRICE, TREE_SURE = 0.1, 0.6
OFF = 2.0  # a threshold no confidence reaches
MIN_GAIN = 1e-4
PASSES = 3
# Costs measured twice on one machine differ by about so much. A trained head is not switched off for less.
NOISE = 0.02
# Added to the measured cost of each draft, in tokens of our own loop. Costs are noisy and many bounds are nearly as
# fast as the fastest; those that draft less lose less on other texts and machines.
CAUTION = 0.01
# Candidates are compared on whole texts of about so many positions, and the best of them then on several times more.
QUICK_POSITIONS, FINALIST_POSITIONS, FINALISTS = 1200, 5000, 2


@dataclass(frozen=True, slots=True)
class Held:
    """Settings that the user has fixed; None leaves a setting free."""

    exit_threshold: float | None = None
    max_exit_layer: int | None = None
    max_draft_tokens: int | None = None


def tune(
    traces: Traces, costs: CostTable, held: Held | None = None, *, requests: int = 1, progress: bool = True
) -> tuple[SpeculationBounds, Totals]:
    """Find the fastest bounds and their replay; among equally fast ones the first, which are the smallest.

    If nothing beats decoding without drafts, the bounds draft nothing, unless the user has fixed the threshold.

    Args:
        requests: that decode together.
    """
    parts = (some_texts(traces, number) for number in (QUICK_POSITIONS, FINALIST_POSITIONS))
    quick, several, replayer = (Replayer(part, costs, requests) for part in (*parts, traces))
    held = held or Held()
    with tqdm(desc="tune", unit="replay", disable=not progress) as bar:

        def best(candidates: Iterable[SpeculationBounds]) -> tuple[float, SpeculationBounds]:
            scored = []
            for bounds in candidates:
                scored.append((_speed(quick, bounds), bounds))
                bar.update()
            scored.sort(key=lambda pair: -pair[0])
            finalists = [(_speed(several, bounds), bounds) for _, bounds in scored[:FINALISTS]]
            return max(finalists, key=lambda pair: pair[0])

        def climb(with_heads: bool) -> tuple[float, SpeculationBounds]:
            """From the best of the grid, one setting at a time, as long as that helps."""

            def fit(candidates: Iterable[SpeculationBounds]) -> list[SpeculationBounds]:
                return [bounds for bounds in candidates if any(bounds.exits(traces.layers)) == with_heads]

            start = fit(_grid(traces, held))
            if not start:
                return -1.0, SpeculationBounds(OFF, 0, 0)
            speed, bounds = best(start)
            for _ in range(PASSES):
                before = speed
                for vary in _settings(traces, held):
                    fastest, candidate = best(fit(vary(bounds)))
                    if fastest > speed * (1 + MIN_GAIN):
                        speed, bounds = fastest, candidate
                if speed <= before * (1 + MIN_GAIN):
                    break
            return speed, bounds

        (with_heads, heads), (alone, lookup) = climb(True), climb(False)
        draft = any(layer > 0 for layer in several.run(heads).drafted)
        speed, bounds = (with_heads, heads) if draft and with_heads > alone * (1 - NOISE) else (alone, lookup)
    bounds = _tidy(traces, bounds, held)
    if held.exit_threshold is None:
        idle = SpeculationBounds(OFF, bounds.max_exit_layer, held.max_draft_tokens or 0)
        if _speed(several, idle) >= speed:
            bounds = idle
    return bounds, replayer.run(bounds)


def _speed(replayer: Replayer, bounds: SpeculationBounds) -> float:
    """Tokens per second with `CAUTION`, rounded so that sums in another order compare equal."""
    replayed, plain = replayer.run(bounds), replayer.costs.of_round((), 1, replayer.requests)[0]
    caution = CAUTION * plain / replayer.requests * replayed.drafted.total()
    return round(1000.0 * replayed.emitted / max(1e-9, float(replayed.ms_by_text.sum()) + caution), 6)


def some_texts(traces: Traces, positions: int) -> Traces:
    """Select evenly spaced texts with about so many positions in total; all texts if there are fewer."""
    texts = traces.num_sequences
    number = max(1, round(texts * min(1.0, positions / len(traces))))
    chosen = np.zeros(texts, dtype=bool)
    chosen[np.arange(number) * texts // number] = True
    return traces.of_sequences(chosen)


def best_uniform(traces: Traces, costs: CostTable) -> Totals:
    """Return the fastest replay with one threshold for all exits: a quick estimate."""
    replayer = Replayer(traces, costs)
    bounds = (SpeculationBounds(tau, max(traces.layers), 4) for tau in QUICK_THRESHOLDS)
    return max((replayer.run(one) for one in bounds), key=lambda totals: totals.speedup)


def cross_fitted(
    traces: Traces, costs: CostTable, held: Held | None = None, *, requests: int = 1, progress: bool = True
) -> float:
    """Predicted speed-up of one request over stock, cross-fitted: bounds tuned on each half of the texts, for so many
    requests together, replayed on the other."""
    odd = np.arange(traces.num_sequences) % 2 == 1
    plain = ms = 0.0
    for part in (odd, ~odd):
        if part.any() and (~part).any():
            bounds, _ = tune(traces.of_sequences(part), costs, held, requests=requests, progress=progress)
            totals = Replayer(traces.of_sequences(~part), costs).run(bounds)
            plain, ms = plain + float(totals.plain_by_text.sum()), ms + float(totals.ms_by_text.sum())
    return plain / ms if ms else 1.0


def _grid(traces: Traces, held: Held) -> Iterator[SpeculationBounds]:
    """The coarse grid: one threshold for all exits, the paper's policy; chains, and trees where they were logged."""
    widths = QUICK_WIDTHS if held.max_draft_tokens is None else (held.max_draft_tokens,)
    deepest = traces.layers if held.max_exit_layer is None else (held.max_exit_layer,)
    thresholds = QUICK_THRESHOLDS if held.exit_threshold is None else (held.exit_threshold,)
    branches = sorted({1, traces.confidence.shape[2]})
    for tau, deep, width, survival, number in product(thresholds, deepest, widths, QUICK_SURVIVALS, branches):
        price, sure = (TREE_PRICE, TREE_SURE) if number > 1 else (0.0, 0.0)
        yield SpeculationBounds(tau, deep, width, {}, survival, price, number, None, sure)


def _settings(traces: Traces, held: Held) -> list[Callable[[SpeculationBounds], Iterator[SpeculationBounds]]]:
    """For each free setting: all its values, with the others unchanged."""
    deepest = max(traces.layers) if held.max_exit_layer is None else held.max_exit_layer
    settings: list[Callable[[SpeculationBounds], Iterator[SpeculationBounds]]] = []

    def thresholds(bounds: SpeculationBounds, varied: int) -> Iterator[SpeculationBounds]:
        own = {layer: bounds.threshold(layer) if layer <= bounds.max_exit_layer else OFF for layer in traces.layers}
        for value in (*THRESHOLDS, OFF):
            yield replace(bounds, max_exit_layer=deepest, exit_thresholds=own | {varied: value})

    if held.exit_threshold is None:
        settings += [partial(thresholds, varied=layer) for layer in traces.layers if layer <= deepest]
    if held.max_draft_tokens is None:
        settings.append(lambda bounds: (replace(bounds, max_draft_tokens=width) for width in WIDTHS))
    settings.append(lambda bounds: (replace(bounds, min_survival=survival) for survival in SURVIVALS))
    settings.append(lambda bounds: (replace(bounds, min_draft_survival=survival) for survival in DRAFT_SURVIVALS))
    settings.append(lambda bounds: (replace(bounds, sure_threshold=sure) for sure in SURE))
    branches = range(1, traces.confidence.shape[2] + 1)
    settings.append(lambda bounds: (replace(bounds, max_branches=number) for number in branches))
    return settings


def _tidy(traces: Traces, bounds: SpeculationBounds, held: Held) -> SpeculationBounds:
    """The same decisions in a shorter form: no unused depth, and no exit threshold equal to the common one."""
    used = bounds.exits(traces.layers)
    deepest = used[-1] if used and held.max_exit_layer is None else bounds.max_exit_layer
    own = {
        layer: bounds.threshold(layer)
        for layer in traces.layers
        if layer <= deepest and bounds.threshold(layer) != bounds.exit_threshold
    }
    return replace(bounds, max_exit_layer=deepest, exit_thresholds=own)
