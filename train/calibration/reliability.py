"""How honest confidences are: calibration error, Brier score, precision by threshold, and a bound on wasted drafts.

Tokens of one text depend on one another, so intervals are over texts: a text is one piece of evidence. Knows no
base model and fits nothing.
"""

import math
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
# The statement about wasted work: at most this share of drafts rejected, wrong with at most this chance.
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
    """Positions of each bin, least sure first."""
    return [part for part in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(part)]


@dataclass(frozen=True, slots=True)
class Texts:
    """Which text each of N positions is of, and how often each text is in each of some bootstrap draws."""

    sequence: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, sequence: NDArray[np.int64]) -> "Texts":
        """With the same bootstrap draws for every figure."""
        number = int(sequence[-1]) + 1
        weights = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=DRAWS)
        return cls(sequence, weights.astype(np.float64))

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sum over each text, shape [texts]."""
        return np.bincount(self.sequence, weights=values, minlength=self.weights.shape[1]).astype(np.float64)

    def interval(self, top: NDArray[Any], bottom: NDArray[Any]) -> list[float] | None:
        """Interval of the ratio of two sums over positions; None where the second may be 0."""
        tops, bottoms = self.weights @ self.sums(top), self.weights @ self.sums(bottom)
        return _quantiles(tops / bottoms) if bool((bottoms > 0).all()) else None

    def ece_interval(self, confidence: Floats, correct: Flags) -> list[float]:
        """Interval of the calibration error, with the bins' edges kept.

        Drawing texts adds noise to every bin, and noise only raises an error: the draws are moved to the estimate.
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


def report(confidences: Confidences, schedule: TemperatureSchedule) -> dict[str, Any]:
    """For `calibration.json`: how honest each exit is before and after, with intervals over texts."""
    before = confidences.at(TemperatureSchedule.none(sorted(confidences.grid)))
    after = confidences.at(schedule)
    texts = Texts.of(confidences.sequence)
    exits = {
        str(layer): {"temperature": schedule[layer]} | describe_exit(before[layer], after[layer], correct, texts)
        for layer, correct in sorted(confidences.correct.items())
    }
    layers = sorted(confidences.correct)
    pooled = [
        np.concatenate([by_layer[layer] for layer in layers]) for by_layer in (before, after, confidences.correct)
    ]
    return {
        "positions": len(confidences.sequence),
        "sequences": int(confidences.sequence[-1]) + 1,
        "schedule": {"kind": schedule.kind, "alpha": schedule.alpha},
        "exits": exits,
        "overall": {
            "ece_before": expected_calibration_error(pooled[0], pooled[2]),
            "ece_after": expected_calibration_error(pooled[1], pooled[2]),
            "brier_before": brier(pooled[0], pooled[2]),
            "brier_after": brier(pooled[1], pooled[2]),
        },
    }


def compare_schedules(confidences: Confidences, num_hidden_layers: int) -> dict[str, Any]:
    """Each kind of schedule side by side: its temperatures, and the calibration error of each exit under it."""
    compared = {}
    for kind in SCHEDULE_KINDS:
        schedule, _ = fit_schedule(confidences, kind, num_hidden_layers)
        confidence = confidences.at(schedule)
        compared[kind] = {
            str(layer): {
                "temperature": schedule[layer],
                "ece": expected_calibration_error(confidence[layer], confidences.correct[layer]),
                "brier": brier(confidence[layer], confidences.correct[layer]),
            }
            for layer in sorted(confidences.grid)
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
    """The lowest threshold at which, with chance `1 - delta` over the texts seen, at most `epsilon` is wasted.

    Wasted: the share of a new text's drafts from this exit that would be rejected, expected over texts exchangeable
    with these. Thresholds are tested from the highest down, each by the Hoeffding-Bentkus p-value, until one fails
    (Learn then Test, arXiv 2110.01052, fixed sequence). It bounds work, never correctness.
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
