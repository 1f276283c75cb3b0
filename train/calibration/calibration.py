"""`Calibrated`: all that is known of fitted heads on text kept out of the fit. Knows no folder and no loop."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.lookup import LookupTable
from runtime.drafting.policy import SpeculationBounds
from runtime.drafting.temperature import TemperatureSchedule
from train.calibration.exit_log import Logged
from train.calibration.lookup_traces import LookupTraces
from train.calibration.reliability import compare_schedules, report
from train.calibration.temperatures import Confidences, collect, fit_schedule, require_positions
from train.calibration.traces import Traces
from train.features.split import Split
from train.features.spread import shaped
from train.replay.costs import CostTable
from train.replay.search import Held, tune
from train.replay.variants import ablate
from train.settings.fit_config import FitConfig

LOOKUP_LAYER = 0


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration found.

    Attributes:
        found: drafts of every exit at every position, at every temperature.
        schedule: exit temperatures.
        lookup: confidences of the depth-0 exit.
        traces: confidence and correctness of every source, for replay.
        costs: of a round, counted from the weights.
        bounds: the fastest by replay with these costs.
        figures: for `calibration.json`.
    """

    found: Confidences
    schedule: TemperatureSchedule
    lookup: LookupTable
    traces: Traces
    costs: CostTable
    bounds: SpeculationBounds
    figures: dict[str, Any]


def calibrate(
    config: FitConfig,
    model: Any,
    heads: DraftHeads,
    calibration: Split,
) -> Calibrated:
    """Temperatures, lookup table, traces and bounds from the calibration split.

    Raises:
        DataError: too little text, or logits that are not finite.
    """
    size = config.per_device_train_batch_size
    batches = calibration.batches(size)
    found = collect(tqdm(batches, "calibrate", unit="batch"), heads)
    require_positions(len(found.sequence))
    schedule, scores = fit_schedule(found, config.schedule, model.config.num_hidden_layers)
    looked_up = LookupTraces.collect(calibration.sequences.rows, found.targets)
    table = looked_up.fit()
    by_lookup = {LOOKUP_LAYER: looked_up.confidences(table)}
    logged = Logged.collect(
        tqdm(calibration.batches(size), "log", unit="batch"),
        heads,
        temperatures=schedule.temperatures,
        ages=heads.exits.one.ages,
    )
    traces = Traces.join(
        logged.confidence | by_lookup,
        logged.correct | {LOOKUP_LAYER: looked_up.correct},
        found.sequence,
        np.array([len(prompt) for prompt, _ in calibration.sequences.rows]),
        uncalibrated=logged.uncalibrated | by_lookup,
        after_wrong=looked_up.confidences_after_wrong(table),
    )
    costs = counted_costs(model, heads)
    bounds, replayed = tune(traces, costs, Held(config.exit_threshold, config.max_exit_layer, config.max_draft_tokens))
    figures = report(found, schedule) | {
        "negative_log_likelihood": scores,
        "lookup": looked_up.report(table),
        "schedules": compare_schedules(found, model.config.num_hidden_layers),
        "replay": replayed.describe(costs),
        "ablations": ablate(traces, bounds, costs),
    }
    return Calibrated(found, schedule, table, traces, costs, bounds, figures)


def counted_costs(model: Any, heads: DraftHeads) -> CostTable:
    """Costs by counting weights: a head or an unembedding against one decoder layer."""
    model = shaped(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    matrix = model.get_output_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    layer = (total - matrix * (1 if tied else 2)) / model.config.num_hidden_layers
    head = heads.exits.one.weights_read / layer
    return CostTable.counted(model.config.num_hidden_layers, head=head, unembedding=matrix / layer)
