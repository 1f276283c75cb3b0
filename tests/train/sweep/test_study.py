"""What varies, read from a file; and trials that several processes share."""

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from train.settings.fit_config import FitConfig
from train.sweep.space import Space
from train.sweep.study import Study

CONFIG = FitConfig(model_name_or_path="-", prompts=["-"], output_dir="-", exit_layers=[2], head_rank=8)


def space(folder: Path, text: str) -> Space:
    """What a file of this text says."""
    (folder / "space.yaml").write_text(text, encoding="utf-8")
    return Space.read(folder / "space.yaml", CONFIG)


def test_lists_and_ranges(tmp_path: Path) -> None:
    """Values come back in their own types; combinations are counted where they can be."""
    found = space(tmp_path, "exit_layers: [[2], [2, 8]]\nhead_rank: {low: 4, high: 12, step: 4}\nhead: [deep]\n")
    own = {"exit_layers": "2", "head_rank": 8, "head": "deep"}
    assert found.params_of(CONFIG) == own and found.num_combinations == len(found.combinations()) == 6
    assert own in found.combinations()
    assert found.settings(own) == {"exit_layers": [2], "head_rank": 8, "head": "deep"}
    endless = space(tmp_path, "learning_rate: {low: 1e-4, high: 1e-2, log: true}\nhead_rank: [4]\n")
    assert endless.num_combinations == float("inf") and endless.params_of(CONFIG) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head_rang: [4]", "unknown setting head_rang .did you mean head_rank"),
        ("max_new_tokens: [4, 8]", "max_new_tokens is the same in all trials; what may vary: exit_layers"),
        ("", "nothing varies; expected a list"),
        ("head_rank: 4", "head_rank: expected a list of values, or {low"),
        ("head: {low: 1, high: 2}", "head: expected a list of values; got"),
        ("head_rank: []", r"expected a list of values, or .*got \[\]"),
        ("head_rank: [four]", "head_rank: expected int, got 'four'"),
        ("head_rank: {low: 4}", "expected a list of values, or"),
        ("head_rank: {low: 8, high: 4}", "expected low below high"),
        ("head_rank: {low: 2, high: 4, logs: true}", "unknown setting logs .did you mean log"),
        ("learning_rate: {low: 0, high: 1, log: true}", "learning_rate: .*got {'low': 0"),
        ("learning_rate: {low: 0.1, high: 7}", "learning_rate: expected at most 1; got 7"),
        ("head: [deep, shallow]", "head: expected one of attention"),
        ("exit_layers: [2, 4]", r"expected a list, such as \[2\]"),
        ("head_rank: [4]\nhead_rank: [8]", "line 2: head_rank is given twice"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    """One line that names the file and what is wrong."""
    with pytest.raises(ConfigError, match=message) as refused:
        space(tmp_path, text)
    assert "space.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_processes_share_the_trials(tmp_path: Path) -> None:
    """A trial that one holds no other gets; one that nobody holds is taken up with its own settings."""
    varied = space(tmp_path, "head_rank: {low: 1, high: 1000}\nhead: [deep, attention]\n")
    one, two = (Study(tmp_path / "s", varied, {"a": 1}, seed=0) for _ in range(2))
    one.begin({"head_rank": 8, "head": "deep"}, 3)
    two.begin({"head_rank": 8, "head": "deep"}, 3)  # is there already
    first, second = one.next(3), two.next(3)
    assert first and second and (first.number, second.number) == (0, 1)
    assert first.params == {"head_rank": 8, "head": "deep"} and second.params != first.params
    second.held.release()  # its process is gone, but not yet the fit
    handle = os.open(second.folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert one.next(2) is None
    os.close(handle)
    again = one.next(3)
    assert again and (again.number, again.params) == (1, second.params)
    one.tell(first, 2.0)
    third = two.next(3)
    assert third and third.number == 2 and two.next(3) is None
    assert [trial.value for trial in two.trials] == [2.0, None, None]


def test_few_combinations_are_all_tried_once(tmp_path: Path) -> None:
    """And then there is nothing new."""
    varied = space(tmp_path, "head_rank: [1, 2]\nhead: [deep, attention]\n")
    study = Study(tmp_path / "s", varied, {}, seed=0)
    study.begin(None, 4)
    seen: list[Any] = []
    while (taken := study.next(9)) is not None:
        seen.append(taken.params)
        study.tell(taken, 1.0)
        taken.held.release()
    assert sorted(map(str, seen)) == sorted(map(str, varied.combinations()))
