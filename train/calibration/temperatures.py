"""Fits exit temperatures on text that the heads have not seen. Needs no base model.

A temperature is fitted by the likelihood of "the draft is the base's choice" under the confidence it gives, which is
the value that the exit rule reads. The paper's linear schedule has one slope, the fitted schedule one temperature per
exit, and the monotone schedule temperatures that never rise with depth. The kind `auto` takes the one of these and
T = 1 that is likeliest on sequences not used to fit it.
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

# 5 % apart: finer than the data can distinguish.
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
    """Temperature index of each exit, shallowest first: the least total loss with none rising with depth."""
    total = np.zeros(len(TEMPERATURES))
    steps = []
    for loss in losses:
        # For each index of this exit, the best index of the shallower exit, which must not be lower.
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
    """Mean negative log-likelihood of the outcomes (correct or not) at each of `TEMPERATURES`."""
    confidence = np.clip(confidences.grid[layer][part].astype(np.float64), 1e-6, 1 - 1e-6)
    correct = confidences.correct[layer][part][:, None]
    losses: NDArray[np.float64] = -np.where(correct, np.log(confidence), np.log1p(-confidence)).mean(axis=0)
    return losses


def _nearest(temperature: float) -> int:
    return int(np.abs(np.log(TEMPERATURES / temperature)).argmin())
