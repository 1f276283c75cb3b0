"""A fit ends when its foretold speed no longer rises; evaluations every `eval_steps`; both may change later."""

import pytest

import train.fitting.loop
from tests.helpers.fits import assert_same_fit
from train.fitting.checkpoints import find_checkpoints

PATIENT = {"max_steps": 12, "save_steps": 100, "save_total_limit": 9, "eval_steps": 2, "early_stopping_patience": 2}
SPEEDS = [1.2, 1.5, 1.4, 1.45, 1.9, 1.8]  # by evaluation


@pytest.fixture
def speeds(monkeypatch):
    """Evaluations say these speed-ups, one after the other; returns what is still to be said."""
    left, evaluate = list(SPEEDS), train.fitting.loop.evaluate

    def say(*rest, **more):
        return evaluate(*rest, **more) | {"held_out/predicted_speedup": left.pop(0)}

    monkeypatch.setattr(train.fitting.loop, "evaluate", say)
    return left


def saved(folder) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in find_checkpoints(folder)]


def test_it_ends_after_evaluations_without_a_rise_and_takes_the_best(quick_fit, tmp_path, speeds, capsys):
    folder, lines = quick_fit(tmp_path / "out", **PATIENT)
    assert len(lines) == 8 and saved(folder) == [2, 4, 8]
    assert [line["step"] for line in lines if "held_out/predicted_speedup" in line] == [2, 4, 6, 8]
    printed = capsys.readouterr().out
    assert "the fit ends: step 8 of 12, no predicted speed-up above 1.50 in 2 evaluations (early_stop" in printed
    assert "the adapter is made from step 4 of 12, the best: 1.50x by layer counts" in printed


def test_without_patience_it_goes_on_to_the_end(quick_fit, tmp_path, speeds):
    _, lines = quick_fit(tmp_path / "out", **PATIENT | {"early_stopping_patience": None})
    assert len(lines) == 12 and not speeds


def test_one_that_ended_is_complete_and_more_patience_goes_on(quick_fit, tmp_path, speeds, capsys):
    folder = tmp_path / "out"
    quick_fit(folder, **PATIENT)
    _, lines = quick_fit(folder, **PATIENT, resume_from_checkpoint="latest")
    assert len(lines) == 8
    assert "the fit is already complete: step 8 of 12, no predicted speed-up above 1.50" in capsys.readouterr().out
    _, lines = quick_fit(folder, **PATIENT | {"early_stopping_patience": 3}, resume_from_checkpoint="latest")
    assert len(lines) == 12 and saved(folder) == [2, 4, 8, 10, 12]


def test_a_count_that_was_cut_off_goes_on(quick_fit, tmp_path, speeds):
    """Stopped between the two evaluations without a rise, and continued."""
    whole = quick_fit(tmp_path / "whole", **PATIENT)
    speeds[:] = SPEEDS
    changed = PATIENT | {"save_steps": 1}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.fitting.loop, "_agreed", lambda accelerator, signal: 15 if len(speeds) == 3 else 0)
        quick_fit(tmp_path / "parts", **changed)
    parts = quick_fit(tmp_path / "parts", **PATIENT, resume_from_checkpoint="latest")
    assert len(parts[1]) == 8
    assert_same_fit(whole, parts)
