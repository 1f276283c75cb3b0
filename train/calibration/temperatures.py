"""Fits exit temperatures on text that the heads have not seen. Needs no base model.

A temperature is fitted by the likelihood of "the draft is the base's choice" under the confidence it gives, which is
the value that the exit rule reads. The paper's linear schedule has one slope, the fitted schedule one temperature per
exit, and the monotone schedule temperatures that never rise with depth. The kind `auto` takes the one of these and
T = 1 that is likeliest on sequences not used to fit it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.temperature import SCHEDULE_KINDS, TemperatureSchedule, linear_temperature
from runtime.errors import DataError
from train.features.extractor import Features

# 5 % apart; what lies between is interpolated.
TEMPERATURES = np.geomspace(0.2, 10.0, 81)
LOGS = np.log(TEMPERATURES)
SLOPES = np.linspace(-0.95, 9.0, 399)
MIN_POSITIONS = 200
CACHED_ROWS = 32

Floats = NDArray[np.float32]
Curves = Mapping[int, CubicSpline]


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
        """Exit layer -> confidence [N] at the schedule's very temperatures, to about six digits."""
        return {layer: _interpolated(grid, schedule[layer]) for layer, grid in self.grid.items()}


def _interpolated(grid: Floats, temperature: float) -> Floats:
    """The cubic through the four nearest columns, in the logarithm of the temperature; shape [N]."""
    place = float(np.clip(np.log(temperature), LOGS[0], LOGS[-1]))
    first = int(np.clip(np.searchsorted(LOGS, place) - 2, 0, len(LOGS) - 4))
    near = LOGS[first : first + 4]
    weights = [np.prod([(place - other) / (one - other) for other in near if other != one]) for one in near]
    return np.clip(grid[:, first : first + 4].astype(np.float64) @ np.array(weights), 0, 1).astype(np.float32)


@torch.no_grad()
def collect(batches: Iterable[Features], heads: DraftHeads, *, age: int | None = None) -> Confidences:
    """Run the heads over features.

    Args:
        age: of the verified state; by default the mixture that heads are fitted on.

    Raises:
        DataError: logits are not finite; the message names the exit layer.
    """
    grids: dict[int, list[Floats]] = {}
    correct: dict[int, list[NDArray[np.bool_]]] = {}
    lengths: list[int] = []
    targets: list[int] = []
    for batch in batches:
        lengths += batch.lengths
        targets += batch.target.tolist()
        choice = heads.target_to_draft[batch.target]
        for layer, logits in heads(batch.hidden, batch.context(age)).items():
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
    """`confidence` of logits [N, V] at each of `TEMPERATURES`, shape [N, temperatures].

    It takes a few rows at a time, so that they stay in the processor's cache.
    """
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
    """Fit exit temperatures; also return the mean negative log-likelihood of each kind on sequences not fitted on.

    Args:
        kind: one of `SCHEDULE_KINDS`, or `auto` for the likeliest of them (the simplest in a tie).
    """
    odd = confidences.sequence % 2 == 1
    curves = [_curves(confidences, part) for part in (odd, ~odd)]
    scores = {
        name: float(
            np.mean([_score(_fit(mine, name, num_hidden_layers), other) for mine, other in (curves, curves[::-1])])
        )
        for name in SCHEDULE_KINDS
    }
    chosen = min(scores, key=lambda name: scores[name]) if kind == "auto" else kind
    return _fit(_curves(confidences, np.ones_like(odd)), chosen, num_hidden_layers), scores


def _curves(confidences: Confidences, part: NDArray[np.bool_]) -> Curves:
    """Exit layer -> mean negative log-likelihood of the outcomes (correct or not), over log temperature."""
    curves = {}
    for layer, grid in confidences.grid.items():
        confidence = np.clip(grid[part].astype(np.float64), 1e-6, 1 - 1e-6)
        correct = confidences.correct[layer][part][:, None]
        losses = -np.where(correct, np.log(confidence), np.log1p(-confidence)).mean(axis=0)
        curves[layer] = CubicSpline(LOGS, losses)
    return curves


def _fit(curves: Curves, kind: str, num_hidden_layers: int) -> TemperatureSchedule:
    layers = sorted(curves)
    if kind == "none":
        return TemperatureSchedule.none(layers)
    if kind == "linear":

        def total(slope: float) -> float:
            return sum(_loss(curves[layer], linear_temperature(slope, layer, num_hidden_layers)) for layer in layers)

        return TemperatureSchedule.linear(round(_lowest(total, SLOPES), 6), layers, num_hidden_layers)

    def best(block: Sequence[int]) -> float:
        """The one temperature that is likeliest for some exits together."""
        return round(math.exp(_lowest(lambda place: sum(float(curves[layer](place)) for layer in block), LOGS)), 6)

    blocks: list[list[int]] = []
    for layer in layers:
        blocks.append([layer])
        # Neighbours that rise with depth get one temperature together, until none rises (pool adjacent violators).
        while kind == "monotone" and len(blocks) > 1 and best(blocks[-2]) < best(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return TemperatureSchedule(kind, {layer: best(block) for block in blocks for layer in block})


def _lowest(function: Callable[[float], float], points: NDArray[np.float64]) -> float:
    """Where a function is lowest: near the best of some points, between its neighbours."""
    values = [function(float(point)) for point in points]
    index = int(np.argmin(values))
    around = points[max(0, index - 1)], points[min(len(points) - 1, index + 1)]
    found = minimize_scalar(function, bounds=around, method="bounded", options={"xatol": 1e-6})
    return float(found.x if found.fun < values[index] else points[index])


def _loss(curve: CubicSpline, temperature: float) -> float:
    return float(curve(np.clip(math.log(temperature), LOGS[0], LOGS[-1])))


def _score(schedule: TemperatureSchedule, curves: Curves) -> float:
    return float(np.mean([_loss(curve, schedule[layer]) for layer, curve in curves.items()]))
