"""A learning rate that is too high ends the fit in one line, with no adapter; noise does not."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from tests.helpers.fits import after_step
from train.fitting.alarms import Divergence
from train.fitting.checkpoints import FitState
from train.settings.fit_config import FitConfig

SEEN = {  # losses of four steps of the tiny recipe at these learning rates
    1.0: [3.25, 6.71, 7.68, 6.61],
    3.0: [3.25, 7.33, 7.94, 6.87],
    100.0: [3.25, 7.63, 7.77, 7.15],
    1e6: [3.25, 5.16, 0.0, float("nan")],
}
LONGER = [3.25, 5.84, 7.54, 6.11, 5.8, 5.94, 5.31, 5.19, 5.11, 4.85, 4.92]  # the first of 40 steps at 1
REAL = {  # 8 steps on SmolLM2-135M
    "deep at 0.03": [30.11, 15.65, 177.89, 89.73, 58.49, 36.57, 25.41, 22.25],
    "deep at 1": [30.11, 223.62, 151.48, 131.66, 127.32, 88.68, 65.83, 57.51],
    "attention at 0.1": [30.94, 69.47, 329.18, 84.57, 57.11, 47.43, 37.98, 37.2],
}
HEALTHY = {  # with the tokens that the heads can draft
    "tiny": (64, [3.25, 3.19, 3.09, 3.06]),
    "no positions in the first step": (64, [0.0, 3.19, 3.09, 3.06]),
    "one sequence a batch": (64, [2.86, 3.83, 3.52, 3.2, 3.1, 3.32, 3.09, 3.22, 3.43, 3.6, 2.66, 2.85]),
    "an easy batch first": (8192, [1.0, 4.2, 4.4, 3.9, 4.1, 4.3, 4.0, 3.8]),
    "a deep head": (8192, [30.11, 26.84, 21.33, 16.88, 17.16, 15.0, 13.05, 13.48]),
    "an attention head": (8192, [30.94, 47.04, 27.22, 38.78, 17.79, 13.74, 10.5, 10.26]),
    "spikes": (64, [3.25, 3.2, 90.0, 80.0, 3.3, 3.2, 70.0, 3.1, 3.0, 60.0]),
}


class Killed(BaseException):
    """Nobody catches it."""


def guarded(total: int, *, vocabulary: int = 64, learning_rate: float = 0.1) -> Divergence:
    """The guard of a fit."""
    config = FitConfig(
        model_name_or_path="-", prompts=["-"], exit_layers=[2], output_dir="-", learning_rate=learning_rate
    )
    return Divergence.of(config, total=total, vocabulary=vocabulary)


def watch(
    losses: Sequence[float],
    *,
    vocabulary: int = 64,
    guard: Divergence | None = None,
    state: FitState | None = None,
    norms: Sequence[float] = (),
) -> FitState:
    """What is kept once a guard has seen these losses, after an earlier run's state."""
    guard, state = guard or guarded(len(losses), vocabulary=vocabulary), state or FitState()
    for number, loss in enumerate(losses):
        state = replace(state, step=state.step + 1)
        state = guard.look(state, loss, norm=norms[number] if norms else None, whole=loss == loss)
    return state


@pytest.mark.parametrize("rate", SEEN)
def test_losses_of_diverging_fits_are_known(rate: float) -> None:
    with pytest.raises(ConfigError, match="the fit diverges"):
        watch(SEEN[rate])


def test_those_of_longer_fits_and_of_a_real_base_are_known() -> None:
    with pytest.raises(ConfigError, match="at step 4"):
        watch(LONGER, guard=guarded(40))
    for losses in REAL.values():
        with pytest.raises(ConfigError, match=r"at step [45]"):
            watch(losses, vocabulary=8192)


@pytest.mark.parametrize("name", HEALTHY)
def test_losses_of_healthy_fits_pass(name: str) -> None:
    vocabulary, losses = HEALTHY[name]
    watch(losses, vocabulary=vocabulary)


@pytest.mark.parametrize("total", [4, 40, 400])
@pytest.mark.parametrize(("vocabulary", "level", "deviation"), [(64, 3.0, 0.2), (8192, 6.0, 0.3), (8192, 30.0, 0.1)])
def test_noise_never_ends_a_fit(total: int, vocabulary: int, level: float, deviation: float) -> None:
    """Losses that fall by a third, with 100 seeds; with the same noise at five times the start a fit does end."""
    for seed in range(100):
        numbers = random.Random(seed)
        noise = [numbers.lognormvariate(0, deviation) for _ in range(total)]
        watch([level * (1 - step / total / 3) * each for step, each in enumerate(noise)], vocabulary=vocabulary)
        with pytest.raises(ConfigError):
            watch([level, *(5 * level * each for each in noise[1:])], vocabulary=vocabulary)


def test_it_goes_on_after_a_resume_as_if_nothing_had_been() -> None:
    guard = guarded(4, learning_rate=3)
    half = watch(SEEN[3.0][:3], guard=guard)
    assert (half.start, half.risen) == (3.25, 2)
    expected = (
        r"the loss is 6.87 at step 4, 3.25 at the start; set learning_rate to 0.3 or less \(3 now\), or raise warm"
    )
    with pytest.raises(ConfigError, match=expected):
        watch([6.87], guard=guard, state=half)


def test_what_was_learnt_and_is_lost_ends_a_fit_far_below_its_start() -> None:
    """After step 600 of 1,000 the loss is that of tokens' frequencies again: once for fifty steps, once for a few."""
    numbers, began = random.Random(0), 24.0
    learning = [max(2.0, began - step / 10) * numbers.lognormvariate(0, 0.2) for step in range(600)]
    lost = [7.5 * numbers.lognormvariate(0, 0.1) for _ in range(60)]
    with pytest.raises(ConfigError, match=r"the loss is .* at step 6\d\d, after a mean of [12]\.\d\d; set"):
        watch([*learning, *lost], guard=guarded(1000, vocabulary=8192))
    watch([*learning, *lost[:40], *learning[-300:]], guard=guarded(1000, vocabulary=8192))


def test_gradients_that_explode_end_a_fit_whose_loss_does_not_show_it() -> None:
    """Negative control: those of a real fit, 136 at first and about 2 later, with spikes."""
    healthy = [136.0, 146.0, 124.5, 119.2, 83.6, 91.5, 60.1, 20.4, 4.2, 2.4, 2.1, 71.4, 2.0, 1.9, 20_000.0, 2.2]
    watch([3.0] * len(healthy), norms=healthy)
    with pytest.raises(ConfigError, match=r"the gradient has norm 3e\+04 at step 6, 146 at most in its first steps"):
        watch([3.0] * 6, norms=[136.0, 146.0, 124.5, 2e4, 4e4, 3e4], guard=guarded(6))


def test_a_diverging_fit_names_the_learning_rate(quick_fit: Any, tmp_path: Path, monkeypatch: Any) -> None:
    expected = (
        r"the loss is .*; set learning_rate to 0.1 or less \(1 now\), or raise warmup_ratio \(0.05 now\), with anoth"
    )
    with pytest.raises(ConfigError, match=expected) as said:
        quick_fit(tmp_path / "whole", learning_rate=1.0)
    assert not (tmp_path / "whole" / "adapter").exists()

    def die() -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        after_step(patch, 2, die)
        quick_fit(tmp_path / "parts", learning_rate=1.0, save_steps=1)
    with pytest.raises(ConfigError) as again:
        quick_fit(tmp_path / "parts", learning_rate=1.0, save_steps=1, resume_from_checkpoint="latest")
    assert str(again.value) == str(said.value)


def test_heads_that_are_no_numbers_end_the_fit(quick_fit: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("train.fit_exits.validate", lambda config: None)
    with pytest.raises(ConfigError, match=r"the fit diverges: the loss is nan at step 4, 3.25 at the start"):
        quick_fit(tmp_path / "out", learning_rate=1e6)


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_a_fit_at_a_rate_that_learns_ends_well(quick_fit: Any, tmp_path: Path, rate: float) -> None:
    _, lines = quick_fit(tmp_path / "out", learning_rate=rate)
    assert len(lines) == 4
