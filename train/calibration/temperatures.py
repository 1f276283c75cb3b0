"""Exit temperatures from text the heads have not seen. Knows no base model.

A temperature is fitted by the likelihood of "the draft is the base's choice" under the confidence it gives,
which is what the exit rule reads; the paper's linear schedule by its one slope, the fitted schedule by one
number per exit, the monotone one by numbers that never rise with depth. Of these and T = 1 the likeliest on
sequences not used to fit them is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.temperature import SCHEDULE_KINDS, TemperatureSchedule, linear_temperature
from runtime.errors import DataError
from train.features.extractor import Features

# 5 % apart: finer than the data can tell.
TEMPERATURES = np.geomspace(0.2, 10.0, 81)
SLOPES = np.linspace(-0.95, 9.0, 399)
MIN_POSITIONS = 200
CACHED_ROWS = 32

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Confidences:
    """Drafts of every exit at N positions of some sequences.

    Attributes:
        grid: exit layer -> confidence at each of `TEMPERATURES`, shape [N, temperatures], float32.
        correct: exit layer -> whether the draft is the base's choice, shape [N], bool.
        sequence: index of each position's sequence, shape [N], not decreasing.
        targets: the base's choice at each position, shape [N], target ids.
    """

    grid: dict[int, Floats]
    correct: dict[int, NDArray[np.bool_]]
    sequence: NDArray[np.int64]
    targets: NDArray[np.int64]

    def at(self, schedule: TemperatureSchedule) -> dict[int, Floats]:
        """Exit layer -> confidence [N] at the schedule's temperatures."""
        return {layer: grid[:, _nearest(schedule[layer])] for layer, grid in self.grid.items()}


@torch.no_grad()
def collect(batches: Iterable[Features], heads: DraftHeads) -> Confidences:
    """Run the heads over features.

    Raises:
        DataError: logits that are not numbers (naming the exit layer).
    """
    grids: dict[int, list[Floats]] = {}
    correct: dict[int, list[NDArray[np.bool_]]] = {}
    lengths: list[int] = []
    targets: list[int] = []
    for batch in batches:
        lengths += batch.lengths
        targets += batch.target.tolist()
        choice = heads.target_to_draft[batch.target]
        for layer, logits in heads(batch.hidden, batch.context()).items():
            if not bool(torch.isfinite(logits).all()):
                raise DataError(f"the head of exit layer {layer} gives logits that are not finite: fit it again")
            grids.setdefault(layer, []).append(_confidence_grid(logits))
            correct.setdefault(layer, []).append((logits.argmax(-1) == choice).cpu().numpy())
    return Confidences(
        grid={layer: np.concatenate(parts) for layer, parts in grids.items()},
        correct={layer: np.concatenate(parts) for layer, parts in correct.items()},
        sequence=np.repeat(np.arange(len(lengths)), lengths),
        targets=np.array(targets),
    )


def _confidence_grid(logits: torch.Tensor) -> Floats:
    """`confidence` of logits [N, V] at each of `TEMPERATURES`, shape [N, temperatures]; a few rows at a time, so
    that they stay in the processor's cache."""
    confidence = torch.empty(len(logits), len(TEMPERATURES))
    for rows, into in zip(logits.split(CACHED_ROWS), confidence.split(CACHED_ROWS), strict=True):
        below = rows.float() - rows.float().amax(dim=-1, keepdim=True)
        buffer = torch.empty_like(below)
        for column, temperature in enumerate(TEMPERATURES):
            total = torch.div(below, float(temperature), out=buffer).exp_().sum(dim=-1)
            into[:, column] = total.reciprocal()
    return confidence.numpy()


def require_positions(number: int) -> None:
    """Raise a DataError where there is too little text to calibrate on."""
    if number < MIN_POSITIONS:
        raise DataError(
            f"only {number} positions to calibrate on: expected at least {MIN_POSITIONS}; "
            "add prompts or raise calibration_fraction"
        )


def fit_schedule(
    confidences: Confidences, kind: str, num_hidden_layers: int
) -> tuple[TemperatureSchedule, dict[str, float]]:
    """Exit temperatures, and the mean negative log-likelihood of each kind on sequences not used to fit it.

    Args:
        kind: one of `SCHEDULE_KINDS`, or `auto` for the likeliest of them, the simpler one of equals.
    """
    odd = confidences.sequence % 2 == 1
    scores = {
        name: float(
            np.mean(
                [_score(confidences, _fit(confidences, name, num_hidden_layers, part), ~part) for part in (odd, ~odd)]
            )
        )
        for name in SCHEDULE_KINDS
    }
    chosen = min(scores, key=lambda name: scores[name]) if kind == "auto" else kind
    return _fit(confidences, chosen, num_hidden_layers, np.ones_like(odd)), scores


def _fit(confidences: Confidences, kind: str, num_hidden_layers: int, part: NDArray[np.bool_]) -> TemperatureSchedule:
    losses = {layer: _losses(confidences, layer, part) for layer in confidences.grid}
    layers = sorted(losses)
    if kind == "none":
        return TemperatureSchedule.none(layers)
    if kind == "fitted":
        return TemperatureSchedule(kind, {layer: float(TEMPERATURES[losses[layer].argmin()]) for layer in layers})
    if kind == "monotone":
        chosen = _non_increasing([losses[layer] for layer in layers])
        return TemperatureSchedule(
            kind, {layer: float(TEMPERATURES[i]) for layer, i in zip(layers, chosen, strict=True)}
        )
    totals = [
        sum(losses[layer][_nearest(linear_temperature(slope, layer, num_hidden_layers))] for layer in layers)
        for slope in SLOPES
    ]
    return TemperatureSchedule.linear(round(float(SLOPES[int(np.argmin(totals))]), 6), layers, num_hidden_layers)


def _non_increasing(losses: list[NDArray[np.float64]]) -> list[int]:
    """Index of a temperature for each exit, shallowest first, never rising with depth, of least total loss."""
    total = np.zeros(len(TEMPERATURES))
    steps = []
    for loss in losses:
        # The shallower exit's best index for each index of this one: at it or above.
        steps.append(np.array([i + int(total[i:].argmin()) for i in range(len(total))]))
        total = loss + total[steps[-1]]
    index = int(total.argmin())
    chosen = [index]
    for before in reversed(steps[1:]):
        index = int(before[index])
        chosen.append(index)
    return chosen[::-1]


def _score(confidences: Confidences, schedule: TemperatureSchedule, part: NDArray[np.bool_]) -> float:
    return float(np.mean([_losses(confidences, layer, part)[_nearest(schedule[layer])] for layer in confidences.grid]))


def _losses(confidences: Confidences, layer: int, part: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean negative log-likelihood of right and wrong at each of `TEMPERATURES`."""
    confidence = np.clip(confidences.grid[layer][part].astype(np.float64), 1e-6, 1 - 1e-6)
    correct = confidences.correct[layer][part][:, None]
    losses: NDArray[np.float64] = -np.where(correct, np.log(confidence), np.log1p(-confidence)).mean(axis=0)
    return losses


def _nearest(temperature: float) -> int:
    return int(np.abs(np.log(TEMPERATURES / temperature)).argmin())
