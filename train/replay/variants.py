"""Ablations: what each part of a policy contributes. Replay and measured runs take the variants from here.

Source: the ablations of the SpecBound paper (arXiv 2604.12247), and more for the parts that go beyond it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer
from train.replay.search import OFF

UNBOUNDED_WIDTH = 16
FULL, UNCALIBRATED = "as chosen", "T = 1 at every exit"


def variants(bounds: SpeculationBounds, layers: Sequence[int]) -> dict[str, SpeculationBounds]:
    """The bounds, and the bounds without each part; `UNCALIBRATED` has the same bounds and other temperatures.

    Args:
        layers: all sources, 0 being the lookup.
    """
    own = dict(bounds.exit_thresholds)
    asked = {layer: tau for layer, tau in own.items() if tau <= 1.0}
    return {
        FULL: bounds,
        UNCALIBRATED: bounds,
        "no depth bound": replace(bounds, max_exit_layer=max(layers), exit_thresholds=asked),
        "no width bound": replace(bounds, max_draft_tokens=UNBOUNDED_WIDTH),
        "no survival stop": replace(bounds, min_survival=0.0, min_draft_survival=0.0),
        "heads alone": replace(bounds, exit_thresholds=own | {0: OFF}),
        "lookup alone": replace(bounds, exit_thresholds=own | {layer: OFF for layer in layers if layer > 0}),
    }


def ablate(traces: Traces, bounds: SpeculationBounds, costs: CostTable) -> dict[str, Any]:
    """Replay every variant: mean accepted length, acceptance rate, layers run and predicted speed-up over stock."""
    passes = CostTable.layer_passes(costs.num_hidden_layers)
    calibrated, uncalibrated = (
        (Replayer(logged, costs), Replayer(logged, passes)) for logged in (traces, traces.without_temperatures())
    )
    figures = {}
    for name, varied in variants(bounds, traces.layers).items():
        timed, counted = uncalibrated if name == UNCALIBRATED else calibrated
        replayed = timed.run(varied)
        figures[name] = {
            "mean_accepted_length": replayed.mean_accepted_length,
            "acceptance_rate": replayed.acceptance_rate,
            "layer_passes_per_token": counted.run(varied).ms_per_token,
            "predicted_speedup": replayed.speedup,
        }
    return figures
