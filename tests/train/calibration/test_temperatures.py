"""Calibration: known temperatures are found, confidences become honest, odd cases are named or survived."""

import numpy as np
import pytest
import torch

from runtime.drafting.temperature import MAX_TEMPERATURE, TemperatureSchedule, confidence, linear_temperature
from runtime.errors import DataError
from train.calibration.reliability import Texts, bounded_waste, expected_calibration_error, hoeffding_bentkus, report
from train.calibration.temperatures import (
    TEMPERATURES,
    Confidences,
    _confidence_grid,
    collect,
    fit_schedule,
    require_positions,
)
from train.features.extractor import Features

LAYERS, NUM_HIDDEN_LAYERS, CLASSES = (2, 4), 8, 12
TRUE = {2: 2.5, 4: 0.6}


def features(number: int, generator: torch.Generator, *, temperatures=TRUE) -> tuple[Features, dict]:
    """Logits as hidden states; choices are drawn from their softmax at the temperatures."""
    logits = {layer: torch.randn(number, CLASSES, generator=generator) * 3 for layer in LAYERS}
    draws = {
        layer: torch.multinomial((z / temperatures[layer]).softmax(-1), 1, generator=generator)[:, 0]
        for layer, z in logits.items()
    }
    zeros = torch.zeros(number, 1)
    lengths = [number // 10] * 10
    whole = Features(logits, zeros, zeros, draws[2], zeros.long(), zeros, lengths)
    return whole, draws


class FakeHeads:
    """Gives the hidden states back as logits, moved so that the draws of each layer are the base's choice."""

    def __init__(self, draws: dict) -> None:
        self.draws, self.target_to_draft = draws, torch.arange(CLASSES)

    def __call__(self, hidden, context):
        rows = torch.arange(len(context.embedding))
        moved = {}
        for layer, logits in hidden.items():
            moved[layer] = logits.clone()
            target, drawn = (
                self.draws[2],
                self.draws[layer],
            )  # swap two classes: softmax is the same but for names
            moved[layer][rows, target], moved[layer][rows, drawn] = logits[rows, drawn], logits[rows, target]
        return moved


def collected(seed: int = 0, number: int = 20_000) -> Confidences:
    whole, draws = features(number, torch.Generator().manual_seed(seed))
    return collect([whole], FakeHeads(draws))


def made(correct: np.ndarray, grid_value: float = 0.7) -> Confidences:
    from train.calibration.temperatures import TEMPERATURES

    confidences = np.broadcast_to(np.clip(grid_value / TEMPERATURES**0.2, 0, 1), (len(correct), len(TEMPERATURES)))
    sequence = np.repeat(np.arange(10), len(correct) // 10)
    return Confidences({3: confidences.astype(np.float32)}, {3: correct}, sequence, np.zeros(len(correct), np.int64))


def figures_of(found: Confidences, schedule: TemperatureSchedule) -> dict:
    plain = found.at(TemperatureSchedule.none(sorted(found.grid)))
    return report(plain, found.at(schedule), found.correct, found.sequence, schedule)


def test_known_temperatures_are_recovered_within_five_percent():
    schedule, _ = fit_schedule(collected(), "fitted", NUM_HIDDEN_LAYERS)
    for layer in LAYERS:
        assert schedule[layer] == pytest.approx(TRUE[layer], rel=0.05)


def test_a_known_slope_is_recovered_within_five_percent():
    true = {layer: linear_temperature(1.6, layer, NUM_HIDDEN_LAYERS) for layer in LAYERS}
    whole, draws = features(20_000, torch.Generator().manual_seed(1), temperatures=true)
    found = collect([whole], FakeHeads(draws))
    schedule, _ = fit_schedule(found, "linear", NUM_HIDDEN_LAYERS)
    assert schedule.kind == "linear"
    for layer in LAYERS:
        assert schedule[layer] == pytest.approx(true[layer], rel=0.05)


def test_auto_takes_the_likeliest_and_calibration_error_falls():
    found = collected()
    schedule, scores = fit_schedule(found, "auto", NUM_HIDDEN_LAYERS)
    assert schedule.kind == min(scores, key=scores.get) == "fitted"
    fresh = collected(seed=5)
    for layer, figures in figures_of(fresh, schedule)["exits"].items():
        assert figures["ece_after"] < 0.02 < figures["ece_before"], layer


def test_two_runs_give_the_same():
    first, second = (fit_schedule(collected(number=2000), "auto", NUM_HIDDEN_LAYERS) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("kind", ["linear", "fitted", "auto", "none"])
def test_always_right_and_never_right_stay_within_bounds(correct, kind):
    schedule, scores = fit_schedule(made(np.full(400, correct)), kind, NUM_HIDDEN_LAYERS)
    assert 0 < schedule[3] <= MAX_TEMPERATURE
    assert all(np.isfinite(score) for score in scores.values())


def test_a_single_class_is_always_sure_and_works():
    whole, _ = features(400, torch.Generator().manual_seed(0))
    one = Features(
        {layer: torch.zeros(400, 1) for layer in LAYERS},
        whole.embedding,
        whole.deep,
        torch.zeros(400, dtype=torch.int64),
        whole.top_ids,
        whole.top_log_probs,
        whole.lengths,
    )

    class SameHeads:
        target_to_draft = torch.zeros(1, dtype=torch.int64)

        def __call__(self, hidden, context):
            return hidden

    found = collect([one], SameHeads())
    schedule, _ = fit_schedule(found, "auto", NUM_HIDDEN_LAYERS)
    assert found.at(schedule)[2].min() == 1.0
    assert figures_of(found, schedule)["exits"]["2"]["agreement"] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_their_layer(value):
    whole, draws = features(400, torch.Generator().manual_seed(0))
    whole.hidden[4][17, 3] = value
    with pytest.raises(DataError, match="exit layer 4 gives logits that are not finite"):
        collect([whole], FakeHeads(draws))


def test_too_few_positions_are_refused():
    require_positions(200)
    with pytest.raises(DataError, match="only 190 positions to calibrate on: expected at least 200"):
        require_positions(190)


def test_a_choice_outside_the_draft_vocabulary_is_never_right():
    whole, draws = features(400, torch.Generator().manual_seed(0))
    heads = FakeHeads(draws)
    heads.target_to_draft = torch.full((CLASSES,), -1)
    found = collect([whole], heads)
    assert not any(correct.any() for correct in found.correct.values())


def test_calibration_error_of_known_numbers():
    confidences = np.array([0.9] * 10 + [0.2] * 10, dtype=np.float32)
    correct = np.array([True] * 5 + [False] * 5 + [True] * 4 + [False] * 6)
    assert expected_calibration_error(confidences, correct, bins=2) == pytest.approx((0.4 + 0.2) / 2, abs=1e-6)
    assert expected_calibration_error(np.full(20, correct.mean(), np.float32), correct, bins=1) == pytest.approx(
        0, abs=1e-6
    )


def test_report_counts_positions_sequences_and_thresholds():
    found = made(np.arange(400) % 2 == 0, grid_value=0.65)
    figures = figures_of(found, TemperatureSchedule.none([3]))
    assert (figures["positions"], figures["sequences"]) == (400, 10)
    by_threshold = {row["threshold"]: row for row in figures["exits"]["3"]["thresholds"]}
    found = by_threshold[0.6]
    assert (found["coverage"], found["precision"], found["precision_interval"]) == (1.0, 0.5, [0.5, 0.5])
    none = {"threshold": 0.7, "coverage": 0.0, "precision": None, "precision_interval": None}
    assert by_threshold[0.7] == none


def test_the_grid_is_the_runtimes_confidence():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 5
    grid = _confidence_grid(logits)
    for index in (0, 40, 80):
        expected = confidence(logits, float(TEMPERATURES[index])).numpy()
        assert grid[:, index] == pytest.approx(expected, rel=1e-5)


def test_temperatures_are_not_those_of_a_grid():
    """What is fitted is what is deployed: confidences between the grid's columns are those of the logits."""
    found = collected()
    fitted = fit_schedule(found, "fitted", NUM_HIDDEN_LAYERS)[0]
    linear = fit_schedule(found, "linear", NUM_HIDDEN_LAYERS)[0]
    assert all(np.abs(np.log(TEMPERATURES / fitted[layer])).min() > 1e-4 for layer in LAYERS)
    whole, draws = features(20_000, torch.Generator().manual_seed(0))
    logits = FakeHeads(draws)(whole.hidden, whole.context())
    for schedule in (fitted, linear, TemperatureSchedule.none(list(LAYERS))):
        for layer, values in found.at(schedule).items():
            assert values == pytest.approx(confidence(logits[layer], schedule[layer]).numpy(), abs=2e-5)


def test_monotone_temperatures_never_rise_with_depth():
    """Where the fitted ones do, the best that do not are taken; where they fall already, they are the same."""
    falling = collected()
    assert fit_schedule(falling, "monotone", NUM_HIDDEN_LAYERS)[0].temperatures == (
        fit_schedule(falling, "fitted", NUM_HIDDEN_LAYERS)[0].temperatures
    )
    rising = Confidences(
        {2: falling.grid[4], 4: falling.grid[2]},
        {2: falling.correct[4], 4: falling.correct[2]},
        falling.sequence,
        falling.targets,
    )
    found, scores = fit_schedule(rising, "monotone", NUM_HIDDEN_LAYERS)
    assert found[2] == found[4] and TRUE[4] < found[2] < TRUE[2]
    assert scores["fitted"] < scores["monotone"] < scores["none"]


def test_intervals_are_of_texts_and_hold_the_estimate():
    """Each has the figure inside; copies of the same few texts do not make it narrower than texts are different."""
    described = figures_of(collected(number=4000), TemperatureSchedule.none(list(LAYERS)))["exits"]["2"]
    low, high = described["agreement_interval"]
    assert low <= described["agreement"] <= high and high - low < 0.2
    assert described["ece_before_interval"][0] <= described["ece_before"] <= described["ece_before_interval"][1] + 0.02
    assert 0 < described["brier_after"] < 0.35


def test_the_bound_on_waste_is_kept():
    """On honest confidences the threshold found wastes at most epsilon on new texts, in nearly all repetitions."""
    broken = stated = 0
    for seed in range(60):
        confidences = np.random.default_rng(seed).random((2, 2400)).astype(np.float32)
        correct = np.random.default_rng(1000 + seed).random((2, 2400)) < confidences
        seen = Texts.of(np.repeat(np.arange(80), 30))
        found = bounded_waste(confidences[0], correct[0], seen, epsilon=0.25, delta=0.1)
        if found["threshold"] is not None:
            stated += 1
            confidences, correct = confidences[1], correct[1]
            broken += float((~correct[confidences >= found["threshold"]]).mean()) > 0.25
    assert stated > 50 and broken <= 0.1 * stated


def test_nothing_is_claimed_of_a_bad_exit_or_of_few_texts():
    """No threshold at all."""
    confidences = np.full(600, 0.95, np.float32)
    wrong = bounded_waste(confidences, np.zeros(600, bool), Texts.of(np.repeat(np.arange(60), 10)))
    few = bounded_waste(confidences, np.ones(600, bool), Texts.of(np.repeat(np.arange(6), 100)))
    assert wrong["threshold"] is None and few["threshold"] is None
    assert hoeffding_bentkus(0.0, 50, 0.25) < 0.001 and hoeffding_bentkus(0.3, 50, 0.25) == 1.0
