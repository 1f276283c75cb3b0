"""Sweeps: trials on one corpus, stopped and continued, judged by replay, and the recipe of the best."""

import json
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from runtime.adapter.folder import load_adapter
from runtime.errors import DataError
from tests.helpers.fits import forget
from train import distil, fit_exits
from train.calibration.traces import HELD_OUT_FILE, TRACES_FILE, Traces
from train.cli.app import app
from train.fitting.interrupts import StopSignals
from train.publishing.contents import CALIBRATION_FILE
from train.replay.costs import CostTable
from train.replay.search import Held, tune
from train.settings.fit_config import parse_config, validate
from train.sweep import sweep as sweeping
from train.sweep.trial import judge, run_module

SPACE = "head_rank: [4, 8]\nlearning_rate: {low: 1.0e-3, high: 1.0e-1, log: true}\n"
COSTS = CostTable.counted(6, head=0.5, unembedding=1.0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None) -> list[tuple[str, Path]]:
    """Entry points that were run, in this process; one whose learning rate is 0.05 fails."""
    done: list[tuple[str, Path]] = []

    def run(module: str, recipe: Path, stop: StopSignals, *flags: str) -> int:
        config = parse_config(["--config", str(recipe), *flags])
        done.append((module, recipe))
        if module == "train.fit_exits" and config.learning_rate == 0.05:
            return 1
        {"train.distil": distil.main, "train.fit_exits": fit_exits.main}[module](config)
        forget()
        return 0

    monkeypatch.setattr(sweeping, "run_module", run)
    return done


@pytest.fixture
def write(make_recipe: Any, tmp_path: Path) -> Any:
    """`write(space, **settings)`: arguments of the command line."""

    def make(space: str = SPACE, **settings: Any) -> list[str]:
        recipe, varied = tmp_path / "recipe.yaml", tmp_path / "space.yaml"
        recipe.write_text(yaml.safe_dump(make_recipe(tmp_path / "out", **settings)), encoding="utf-8")
        varied.write_text(space, encoding="utf-8")
        return ["sweep", str(recipe), "--space", str(varied)]

    return make


def test_a_sweep_is_continued_and_leaves_the_best_recipe(runs: Any, write: Any, tmp_path: Path) -> None:
    """The recipe itself comes first; no trial is run twice; features are computed once."""
    folder, arguments = tmp_path / "out" / "sweep", write()
    first = CliRunner().invoke(app, [*arguments, "--trials", "1"])
    assert first.exit_code == 0, first.output
    own = load_adapter(folder / "trial-000" / "adapter").config
    assert own.head_rank == 4 and "trial 0, 1 of 1: head_rank 4, learning_rate 0.01" in first.output
    again = CliRunner().invoke(app, [*arguments, "--trials", "2"])
    assert again.exit_code == 0 and "best so far" in again.output and "best.yaml is the recipe" in again.output
    fits = [recipe.parent.name for module, recipe in runs if module == "train.fit_exits"]
    assert fits == ["trial-000", "trial-001"]
    assert len(list((folder / "features").rglob("*.safetensors"))) == 3 and not list(folder.rglob("checkpoint-*"))
    results = json.loads((folder / "sweep.json").read_text())
    best, other = results["trials"]
    assert results["objective"] == "mean_accepted_length" and {best["number"], other["number"]} == {0, 1}
    assert best["mean_accepted_length"] >= other["mean_accepted_length"]
    told = json.loads((folder / f"trial-00{best['number']}" / "adapter" / "calibration.json").read_text())
    told = told["fitted_on"]["replay"]
    assert best["mean_accepted_length"] == told["mean_accepted_length"]
    assert (folder / "sweep.md").read_text().count("\n| ") == 4
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    recipe = parse_config(["--config", str(folder / "best.yaml")])
    validate(recipe)
    assert {name: getattr(recipe, name) for name in best["settings"]} == best["settings"]
    assert recipe.features == "online" and recipe.max_steps == 4 and recipe.output_dir == str(folder / "best")
    done = CliRunner().invoke(app, [*arguments, "--trials", "2"])
    assert done.exit_code == 0 and len(runs) == 4  # two of the corpus


def test_other_settings_are_refused(write: Any, tmp_path: Path) -> None:
    """A folder is of one recipe, one space and one cost table."""
    _, recipe, _, space = write()
    sweeping.Sweep(Path(recipe), Path(space), None, None)
    for space, settings, named in ((SPACE, {"max_steps": 5}, "max_steps"), ("head_rank: [4, 16]\n", {}, "space")):
        refused = CliRunner().invoke(app, [*write(space, **settings), "--trials", "2"])
        assert refused.exit_code == 1 and f"with other {named}" in refused.stderr
        assert refused.stderr.count("\n") == 1
    COSTS.write(tmp_path / "costs.json")
    refused = CliRunner().invoke(app, [*write(), "--costs", str(tmp_path / "costs.json")])
    assert "with other costs" in refused.stderr
    CostTable.counted(7, head=0.5, unembedding=1.0).write(tmp_path / "costs.json")
    refused = CliRunner().invoke(app, [*write(), "--costs", str(tmp_path / "costs.json")])
    assert "the costs are of a base of 7 layers" in refused.stderr
    refused = CliRunner().invoke(app, write("exit_layers: [[2], [9]]\n"))
    assert "space.yaml: exit_layers: expected layers in 1 to 5" in refused.stderr


def test_failed_trials_are_passed_over(runs: Any, write: Any, tmp_path: Path) -> None:
    """One of three; where the first three fail, the sweep ends."""
    found = CliRunner().invoke(app, write("learning_rate: [0.01, 0.05, 0.02]\n"))
    assert found.exit_code == 0 and "failed with exit code 1" in found.output and "; failed: " in found.output
    results = json.loads((tmp_path / "out" / "sweep" / "sweep.json").read_text())
    assert sorted(trial["settings"]["learning_rate"] for trial in results["trials"]) == [0.01, 0.02]
    space = "head_rank: [2, 3, 4, 5, 6]\n"
    failed = CliRunner().invoke(app, [*write(space, learning_rate=0.05), "--output", str(tmp_path / "other")])
    assert failed.exit_code == 1 and "no trial came to an end, 3 failed" in failed.stderr


def test_the_speed_is_that_of_the_head_fitted(fitted: Path) -> None:
    """By replay of the calibration text, with costs in proportion to the head's own size."""
    weights = load_adapter(fitted).heads.one.weights_read
    held = Held(exit_threshold=0.01, max_exit_layer=4, max_draft_tokens=3)
    of_it, of_a_half = (replace(COSTS, conditions={"head_weights": timed}) for timed in (weights, weights / 2))
    assert of_a_half.for_head(weights).head == 2 * COSTS.head
    figures, slower = judge(fitted.parent, of_it, held), judge(fitted.parent, of_a_half, held)
    assert slower["predicted_speedup"] < figures["predicted_speedup"]
    traces = Traces.read(fitted / TRACES_FILE, weights_sha256=load_adapter(fitted).config.weights_sha256)
    assert figures["predicted_speedup"] == tune(traces, of_it, held, progress=False)[1].speedup
    with pytest.raises(DataError, match="do not say which head was timed"):
        judge(fitted.parent, COSTS, held)


def test_no_trial_is_chosen_on_the_text_of_its_card(fitted: Path, tmp_path: Path) -> None:
    """Held-out text, which the best one's card says chose nothing: trials are judged alike without it."""
    weights = load_adapter(fitted).heads.one.weights_read
    costs, held = replace(COSTS, conditions={"head_weights": weights}), Held(0.01, 4, 3)
    shutil.copytree(fitted, tmp_path / "adapter")
    (tmp_path / "adapter" / HELD_OUT_FILE).unlink()
    path = tmp_path / "adapter" / CALIBRATION_FILE
    calibrated = json.loads(path.read_text())
    path.write_text(json.dumps(calibrated | {"replay": None}))
    for given in (costs, None):
        assert judge(tmp_path, given, held) == judge(fitted.parent, given, held)
    assert judge(tmp_path, None, held)["mean_accepted_length"] != calibrated["replay"]["mean_accepted_length"]


def test_an_entry_point_is_told_of_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends by itself, and the sweep with it; other exit codes are returned."""
    (tmp_path / "entry.py").write_text(
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('told').touch(), sys.exit(143)))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60 if sys.argv[-1] == 'wait' else 0)\nsys.exit(7)\n"
    )
    monkeypatch.chdir(tmp_path)
    with StopSignals() as stop:
        assert run_module("entry", tmp_path / "r.yaml", stop) == 7
    (tmp_path / "ready").unlink()

    def signal_when_ready() -> None:
        while not (tmp_path / "ready").exists():
            pause.wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    pause = threading.Event()
    thread = threading.Thread(target=signal_when_ready)
    with pytest.raises(SystemExit) as ended, StopSignals() as stop:
        thread.start()
        run_module("entry", tmp_path / "r.yaml", stop, "wait")
    thread.join()
    assert ended.value.code == 143 and (tmp_path / "told").exists()


def test_no_corpus_no_sweep(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own line has said why."""
    monkeypatch.setattr(sweeping, "run_module", lambda *rest: 1)
    found = CliRunner().invoke(app, write(corpus_dir=None))
    assert found.exit_code == 1 and not found.stderr
