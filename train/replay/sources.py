"""What each source of drafts is worth: the predicted speed with it and without it. By replay; needs no model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import LOOKUP_LAYER, Traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer
from train.replay.search import OFF

LOOKUP, IN_USE = "lookup", "in use"
WIDTH = 4  # drafts of a round with a source that is tried where there are none


def sources(traces: Traces, costs: CostTable, bounds: SpeculationBounds) -> dict[str, str]:
    """What each source is worth: the predicted speed-up over stock with it and without it, in words."""
    replayer = Replayer(traces, costs)
    used = bounds.exits(traces.layers) if bounds.max_draft_tokens else []
    chosen = replayer.run(bounds).speedup
    worth = {}
    for layer in traces.layers:
        tau = OFF if layer in used else max(0.3, bounds.sure_threshold)
        deepest, width = max(layer, bounds.max_exit_layer), bounds.max_draft_tokens or WIDTH
        own = {**{each: OFF for each in traces.layers if each not in used}, **bounds.exit_thresholds, layer: tau}
        varied = replace(bounds, max_exit_layer=deepest, exit_thresholds=own, max_draft_tokens=width)
        other = replayer.run(varied).speedup
        name = f"layer {layer}" if layer != LOOKUP_LAYER else LOOKUP
        said = f"{IN_USE}, {other:.2f}x without it" if layer in used else f"never asked, {other:.2f}x with it"
        worth[name] = f"{said} instead of {chosen:.2f}x"
    return worth


def idle(worth: Mapping[str, str], costs: Any) -> str:
    """What no source or no head in use means, in a sentence; empty where a head is asked.

    Args:
        costs: that the speeds were predicted with, as `Totals.describe` tells them: text where they were counted.
    """
    used = [name for name, said in worth.items() if said.startswith(IN_USE)]
    heads = [name for name in worth if name != LOOKUP]
    if set(heads) & set(used):
        return ""
    left = "only the lookup drafts" if used else "nothing is drafted, and the adapter saves no time"
    none = "The head is never" if len(heads) == 1 else "None of the heads is ever"
    counted = ", or choose bounds for this machine with `specbound profile` and `specbound tune`"
    then = f"Fit on more text or for longer{counted if isinstance(costs, str) else ''}"
    return f"{none} asked with these bounds: {left}. {then}"
