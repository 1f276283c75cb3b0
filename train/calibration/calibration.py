"""`Calibration`: everything measured on fitted heads with text kept out of the fit. Needs no bounds and no folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.lookup import LookupTable
from runtime.drafting.temperature import TemperatureSchedule
from runtime.errors import DataError
from train.calibration.exit_log import ExitLog
from train.calibration.lookup_traces import LookupTraces
from train.calibration.reliability import compare_schedules, report
from train.calibration.temperatures import collect, fit_schedule, require_positions
from train.calibration.traces import LOOKUP_LAYER, Traces
from train.features.extractor import Features
from train.features.split import Split
from train.settings.fit_config import FitConfig

# Answer tokens logged of each split: an adapter's folder holds the traces, and stays small.
MOST_POSITIONS = 40_000


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that calibration measured.

    Attributes:
        schedule: exit temperatures.
        lookup: confidences of the depth-0 exit.
        traces: confidence and correctness of every source on the calibration split, to choose bounds by replay.
        unseen: the same of held-out texts that nothing is chosen on, for figures.
        told: `unseen` with the texts' own tokens in the place of the base's choices, to compare replay with a run.
        rows: prompt ids and response ids of the texts of `unseen`.
        figures: for `calibration.json`, of `unseen`.
    """

    schedule: TemperatureSchedule
    lookup: LookupTable
    traces: Traces
    unseen: Traces
    told: Traces
    rows: list[tuple[list[int], list[int]]]
    figures: dict[str, Any]


def calibrate(config: FitConfig, model: Any, heads: DraftHeads, calibration: Split, held_out: Split) -> Calibration:
    """Compute temperatures, lookup table and traces in one pass of the base over each of two splits.

    Temperatures, table and bounds come from the first, figures from the second, without the texts that judged
    checkpoints. The features stay in CPU memory, because the heads run over them several times. Each position takes
    about (exits + 2) hidden states.

    Raises:
        DataError: too little text, or logits that are not finite.
    """
    size, ages = config.per_device_train_batch_size, heads.exits.one.ages
    layers = model.config.get_text_config().num_hidden_layers
    device = calibration.extract.layers.device

    def moved(features: Sequence[Features], what: str) -> Iterator[Features]:
        return (batch.to(device) for batch in tqdm(features, what, unit="batch"))

    def logged(features: Sequence[Features]) -> ExitLog:
        return ExitLog.collect(moved(features, "log"), heads, temperatures=schedule.temperatures, ages=ages)

    chosen = texts_of(calibration.sequences.rows)
    first = calibration.batches(size, end=len(chosen))
    features = [batch.to("cpu") for batch in tqdm(first, "features", unit="batch")]
    confidences = collect(moved(features, "calibrate"), heads)
    require_positions(len(confidences.sequence))
    schedule, scores = fit_schedule(confidences, config.schedule, layers)
    looked_up = LookupTraces.collect(chosen, confidences.targets)
    table = looked_up.fit()
    traces = Traces.of(chosen, logged(features), (looked_up, table))

    rows = unseen_rows(held_out)
    others = held_out.batches(size, first=held_out.num_judges, end=held_out.num_judges + len(rows))
    features = [batch.to("cpu") for batch in tqdm(others, "features held out", unit="batch")]
    log = logged(features)
    looked_up = LookupTraces.collect(rows, log.targets)
    unseen = Traces.of(rows, log, (looked_up, table))
    fitted_on = {"positions": len(traces), "sequences": traces.num_sequences}
    figures = _reliability(unseen, schedule) | {
        "fitted_on": fitted_on,
        "negative_log_likelihood": scores,
        "lookup": looked_up.report(table),
        "schedules": compare_schedules(confidences, collect(moved(features, "compare"), heads, age=ages[0]), layers),
    }
    tokens = np.array([token for _, response in rows for token in response])
    told = Traces.of(rows, log, (LookupTraces.collect(rows, tokens), table), targets=tokens)
    return Calibration(schedule, table, traces, unseen, told, rows, figures)


def texts_of(rows: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """The first texts whose answers have `MOST_POSITIONS` together, or a little more."""
    before = np.cumsum([0, *(len(response) for _, response in rows[:-1])])
    return rows[: int((before < MOST_POSITIONS).sum())]


def unseen_rows(held_out: Split) -> list[tuple[list[int], list[int]]]:
    """The held-out texts that judge no checkpoint, as many as figures are told of.

    Raises:
        DataError: none of them has two tokens, so that nothing could be drafted.
    """
    rows = texts_of(held_out.sequences.rows[held_out.num_judges :])
    if all(len(response) < 2 for _, response in rows):
        raise DataError(
            "no held-out answer has two tokens, so no figures can be told: add prompts or raise held_out_fraction"
        )
    return rows


def _half(confidence: NDArray[np.float32]) -> NDArray[np.float32]:
    return confidence.astype(np.float16).astype(np.float32)


def _reliability(unseen: Traces, schedule: TemperatureSchedule) -> dict[str, Any]:
    """Figures of every exit, as a round's first draft, in the precision of a file of traces."""
    rows = {layer: row for row, layer in enumerate(unseen.layers) if layer != LOOKUP_LAYER}
    assert unseen.uncalibrated is not None
    before = {layer: _half(unseen.uncalibrated[row, 0, 0]) for layer, row in rows.items()}
    after = {layer: _half(unseen.confidence[row, 0, 0]) for layer, row in rows.items()}
    correct = {layer: unseen.correct[row, 0] for layer, row in rows.items()}
    return report(before, after, correct, unseen.sequence, schedule)
