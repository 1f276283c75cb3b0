"""How reliable confidences are: calibration error, Brier score, precision by threshold, and a bound on wasted drafts.

Tokens of one text depend on each other, so intervals resample whole texts. Needs no base model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from runtime.drafting.temperature import SCHEDULE_KINDS, TemperatureSchedule
from train.calibration.temperatures import Confidences, fit_schedule

BINS = 15
DRAWS = 400
LEVEL = 0.95
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# The bound on waste: at most a share EPSILON of drafts is rejected; it fails with a probability of at most DELTA.
EPSILON, DELTA = 0.25, 0.1
RISK_THRESHOLDS = tuple(round(0.99 - 0.03 * step, 2) for step in range(24))
FEWEST_TEXTS = 10

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


def expected_calibration_error(confidence: Floats, correct: Flags, *, bins: int = BINS) -> float:
    """ECE in [0, 1] over bins of equal mass: mean of |accuracy - confidence|, weighted by positions."""
    parts = _equal_mass(confidence, bins)
    gaps = [len(part) * abs(float(correct[part].mean()) - float(confidence[part].mean())) for part in parts]
    return float(sum(gaps) / len(confidence))


def _equal_mass(confidence: Floats, bins: int) -> list[NDArray[np.int64]]:
    """Positions of each bin, least confident first."""
    return [part for part in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(part)]


@dataclass(frozen=True, slots=True)
class Texts:
    """The text of each of N positions, and how often each bootstrap draw contains each text."""

    sequence: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, sequence: NDArray[np.int64]) -> "Texts":
        """Draw the bootstrap samples; the seed is fixed, so every figure uses the same ones."""
        number = int(sequence[-1]) + 1
        weights = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=DRAWS)
        return cls(sequence, weights.astype(np.float64))

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sum over each text, shape [texts]."""
        return np.bincount(self.sequence, weights=values, minlength=self.weights.shape[1]).astype(np.float64)

    def interval(self, top: NDArray[Any], bottom: NDArray[Any]) -> list[float] | None:
        """Bootstrap interval of the ratio of two sums over positions; None if the second is 0 in any draw."""
        tops, bottoms = self.weights @ self.sums(top), self.weights @ self.sums(bottom)
        return _quantiles(tops / bottoms) if bool((bottoms > 0).all()) else None

    def ece_interval(self, confidence: Floats, correct: Flags) -> list[float]:
        """Bootstrap interval of the calibration error; the bins' edges stay fixed.

        Resampling adds noise to every bin, and noise can only raise the error. So the draws are shifted until their
        mean is the estimate.
        """
        total, length = np.zeros(len(self.weights)), self.weights @ self.sums(np.ones(len(confidence)))
        for part in _equal_mass(confidence, BINS):
            gap = np.zeros(len(confidence))
            gap[part] = correct[part].astype(np.float64) - confidence[part]
            total += np.abs(self.weights @ self.sums(gap))
        draws = total / length
        return _quantiles(np.maximum(0.0, draws - draws.mean() + expected_calibration_error(confidence, correct)))


def _quantiles(values: NDArray[np.float64]) -> list[float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def report(
    before: Mapping[int, Floats],
    after: Mapping[int, Floats],
    correct: Mapping[int, Flags],
    sequence: NDArray[np.int64],
    schedule: TemperatureSchedule,
) -> dict[str, Any]:
    """Figures for `calibration.json`: reliability of each exit before and after calibration, with intervals.

    Args:
        before, after: exit layer -> confidence at T = 1, and at the temperatures deployed, shape [N].
        correct: exit layer -> whether the draft is the base's choice, shape [N].
        sequence: index of each position's text, shape [N], not decreasing.
        schedule: the temperatures deployed.
    """
    texts = Texts.of(sequence)
    exits = {
        str(layer): {"temperature": schedule[layer]}
        | describe_exit(before[layer], after[layer], correct[layer], texts)
        for layer in sorted(correct)
    }
    layers = sorted(correct)
    pooled = [np.concatenate([by_layer[layer] for layer in layers]) for by_layer in (before, after, correct)]
    return {
        "positions": len(sequence),
        "sequences": int(sequence[-1]) + 1,
        "schedule": {"kind": schedule.kind, "alpha": schedule.alpha},
        "exits": exits,
        "overall": {
            "ece_before": expected_calibration_error(pooled[0], pooled[2]),
            "ece_after": expected_calibration_error(pooled[1], pooled[2]),
            "brier_before": brier(pooled[0], pooled[2]),
            "brier_after": brier(pooled[1], pooled[2]),
        },
    }


def compare_schedules(fitted_on: Confidences, unseen: Confidences, num_hidden_layers: int) -> dict[str, Any]:
    """Compare the kinds of schedule: temperature, calibration error and Brier score of each exit under each kind.

    Args:
        fitted_on: text that each kind is fitted on.
        unseen: other text, which the errors are of.
    """
    compared = {}
    for kind in SCHEDULE_KINDS:
        schedule, _ = fit_schedule(fitted_on, kind, num_hidden_layers)
        confidence = unseen.at(schedule)
        compared[kind] = {
            str(layer): {
                "temperature": schedule[layer],
                "ece": expected_calibration_error(confidence[layer], unseen.correct[layer]),
                "brier": brier(confidence[layer], unseen.correct[layer]),
            }
            for layer in sorted(unseen.grid)
        }
    return compared


def describe_exit(before: Floats, after: Floats, correct: Flags, texts: Texts) -> dict[str, Any]:
    """One exit: agreement, ECE and Brier before and after, precision and coverage by threshold, the bound on waste."""
    ones = np.ones(len(correct))
    return {
        "agreement": float(correct.mean()),
        "agreement_interval": texts.interval(correct, ones),
        "ece_before": expected_calibration_error(before, correct),
        "ece_before_interval": texts.ece_interval(before, correct),
        "ece_after": expected_calibration_error(after, correct),
        "ece_after_interval": texts.ece_interval(after, correct),
        "brier_before": brier(before, correct),
        "brier_after": brier(after, correct),
        "thresholds": [_at_threshold(after, correct, threshold, texts) for threshold in THRESHOLDS],
        "risk": bounded_waste(after, correct, texts),
    }


def brier(confidence: Floats, correct: Flags) -> float:
    """Mean squared difference of confidence and outcome."""
    return float(np.mean((confidence.astype(np.float64) - correct) ** 2))


def _at_threshold(confidence: Floats, correct: Flags, threshold: float, texts: Texts) -> dict[str, Any]:
    taken = confidence >= threshold
    return {
        "threshold": threshold,
        "coverage": float(taken.mean()),
        "precision": float(correct[taken].mean()) if taken.any() else None,
        "precision_interval": texts.interval(taken & correct, taken),
    }


def bounded_waste(
    confidence: Floats, correct: Flags, texts: Texts, *, epsilon: float = EPSILON, delta: float = DELTA
) -> dict[str, Any]:
    """Find the lowest threshold at which, with probability `1 - delta`, the waste is at most `epsilon`.

    The waste is the expected share of this exit's drafts that are rejected on a new text exchangeable with these.
    Thresholds are tested from the highest down by the Hoeffding-Bentkus p-value, until one fails (Learn then Test,
    arXiv 2110.01052, fixed-sequence testing). The bound concerns work, never correctness.
    """
    lowest = None
    for threshold in RISK_THRESHOLDS:
        taken = texts.sums(confidence >= threshold)
        drafting = taken > 0
        if int(drafting.sum()) < FEWEST_TEXTS:
            continue  # not tested: no claim is made
        wasted = texts.sums((confidence >= threshold) & ~correct)[drafting] / taken[drafting]
        if hoeffding_bentkus(float(wasted.mean()), len(wasted), epsilon) > delta:
            break
        lowest = threshold
    return {"epsilon": epsilon, "delta": delta, "threshold": lowest}


def hoeffding_bentkus(mean: float, number: int, epsilon: float) -> float:
    """P-value of "the expectation is above epsilon", from the mean of `number` independent values in [0, 1]."""
    if mean >= epsilon:
        return 1.0
    low, high = max(mean, 1e-12), epsilon
    divergence = low * math.log(low / high) + (1 - low) * math.log((1 - low) / (1 - high))
    bentkus = math.e * float(binom.cdf(math.ceil(number * mean), number, epsilon))
    return min(1.0, math.exp(-number * divergence), bentkus)
