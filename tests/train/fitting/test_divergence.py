"""A learning rate that is too high ends the fit in one line, with no adapter; noise does not."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from tests.helpers.fits import after_step
from train.fitting.alarms import Divergence

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


def watch(losses: Sequence[float], *, vocabulary: int = 64, guard: Divergence | None = None) -> Divergence:
    """A guard that has seen these losses."""
    guard = guard or Divergence(0.1, total=len(losses), vocabulary=vocabulary, start=None, risen=0)
    for step, loss in enumerate(losses, start=1):
        guard.look(loss, step=step, whole=loss == loss)
    return guard


@pytest.mark.parametrize("rate", SEEN)
def test_losses_of_diverging_fits_are_known(rate: float) -> None:
    with pytest.raises(ConfigError, match="the fit diverges"):
        watch(SEEN[rate])


def test_those_of_longer_fits_and_of_a_real_base_are_known() -> None:
    with pytest.raises(ConfigError, match="at step 4"):
        watch(LONGER, guard=Divergence(1, total=40, vocabulary=64, start=None, risen=0))
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
    half = watch(SEEN[3.0][:3], guard=Divergence(3, total=4, vocabulary=64, start=None, risen=0))
    assert (half.start, half.risen) == (3.25, 2)
    again = Divergence(3, total=4, vocabulary=64, start=half.start, risen=half.risen)
    expected = "the loss is 6.87 at step 4, 3.25 at the start; set learning_rate to 0.3 or less"
    with pytest.raises(ConfigError, match=expected):
        again.look(6.87, step=4, whole=True)


def test_a_diverging_fit_names_the_learning_rate(quick_fit: Any, tmp_path: Path, monkeypatch: Any) -> None:
    expected = r"the fit diverges: the loss is .*; set learning_rate to 0.1 or less \(1 now\), with another output_dir"
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
