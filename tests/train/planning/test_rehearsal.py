"""What a dry run says of hours: base and heads, each by the clock."""

import re
import time

import pytest

from train import fit_exits
from train.fitting.learner import Learner
from train.settings.fit_config import FitConfig


@pytest.mark.parametrize("head", ["deep", "attention"])
def test_a_dry_run_times_the_heads(make_recipe, fresh_accelerate, tmp_path, capsys, monkeypatch, head):
    """Two batches a step that takes the heads two seconds: 90 steps take three minutes."""
    learn, seen = Learner.learn, []

    def slow(self, text, *, step, learning_rate):
        time.sleep(2)
        seen.append((text.num_positions, len(text.batches)))
        return learn(self, text, step=step, learning_rate=learning_rate)

    monkeypatch.setattr(Learner, "learn", slow)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 90, "features": "cache", "head": head}
    fit_exits.main(FitConfig(**make_recipe(tmp_path / "out", dry_run=True, **settings)))
    said = capsys.readouterr().out
    assert seen == [(2 * 8 * 16, 2)] * 2  # once to warm up
    found = re.search(r"fit +about (\d+) min, .* the base \S+ s and the heads (\S+) s", said)
    assert found and int(found[1]) in (3, 4) and 1 <= float(found[2]) < 1.5, said
    assert not (tmp_path / "out").exists()
