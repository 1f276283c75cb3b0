"""`Calibration`: everything measured on fitted heads with text kept out of the fit. Needs no bounds and no folder."""

from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.lookup import LookupTable
from runtime.drafting.temperature import TemperatureSchedule
from train.calibration.exit_log import ExitLog
from train.calibration.lookup_traces import LookupTraces
from train.calibration.reliability import compare_schedules, report
from train.calibration.temperatures import Confidences, collect, fit_schedule, require_positions
from train.calibration.traces import Traces
from train.features.split import Split
from train.settings.fit_config import FitConfig


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that calibration measured.

    Attributes:
        confidences: drafts of every exit at every position, at every temperature.
        schedule: exit temperatures.
        lookup: confidences of the depth-0 exit.
        traces: confidence and correctness of every source, for replay.
        figures: for `calibration.json`.
    """

    confidences: Confidences
    schedule: TemperatureSchedule
    lookup: LookupTable
    traces: Traces
    figures: dict[str, Any]


def calibrate(
    config: FitConfig,
    model: Any,
    heads: DraftHeads,
    calibration: Split,
) -> Calibration:
    """Compute temperatures, lookup table and traces in one pass of the base over the calibration split.

    The features stay in CPU memory, because the heads run over them twice: once to fit the temperatures, and once with
    these temperatures at every age of the verified state. Each position takes about (exits + 2) hidden states.

    Raises:
        DataError: too little text, or logits that are not finite.
    """
    size = config.per_device_train_batch_size
    device = calibration.extract.layers.device
    features = [batch.to("cpu") for batch in tqdm(calibration.batches(size), "features", unit="batch")]
    confidences = collect((batch.to(device) for batch in tqdm(features, "calibrate", unit="batch")), heads)
    require_positions(len(confidences.sequence))
    schedule, scores = fit_schedule(confidences, config.schedule, model.config.get_text_config().num_hidden_layers)
    looked_up = LookupTraces.collect(calibration.sequences.rows, confidences.targets)
    table = looked_up.fit()
    exits = ExitLog.collect(
        (batch.to(device) for batch in tqdm(features, "log", unit="batch")),
        heads,
        temperatures=schedule.temperatures,
        ages=heads.exits.one.ages,
    )
    traces = Traces.of(calibration.sequences.rows, exits, (looked_up, table))
    figures = report(confidences, schedule) | {
        "negative_log_likelihood": scores,
        "lookup": looked_up.report(table),
        "schedules": compare_schedules(confidences, model.config.get_text_config().num_hidden_layers),
    }
    return Calibration(confidences, schedule, table, traces, figures)
