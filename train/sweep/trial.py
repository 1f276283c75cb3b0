"""One trial of a sweep: its recipe, its fit in a process of its own, and its figures."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from runtime.adapter.folder import load_adapter
from runtime.files import write_atomic
from train.calibration.traces import TRACES_FILE, Traces
from train.fitting.interrupts import StopSignals, exit_code
from train.publishing.contents import CALIBRATION_FILE
from train.replay.costs import CostTable
from train.replay.search import Held, tune
from train.settings.fit_config import FitConfig

RECIPE, FIGURES = "recipe.yaml", "figures.json"
POLL = 0.2  # seconds


def write_recipe(path: Path, config: FitConfig, changes: Mapping[str, Any], *, comment: str) -> None:
    """Write a recipe with changed settings; what has its default is left out."""
    default = {name for name, source in config.sources.items() if source == "default"}
    settings = {name: value for name, value in asdict(config).items() if name not in default | {"sources"}}
    text = yaml.safe_dump(settings | dict(changes), sort_keys=False, allow_unicode=True)
    write_atomic(path, f"# {comment}\n{text}".encode())


def run_module(module: str, recipe: Path, stop: StopSignals, *flags: str) -> int:
    """Run an entry point with a recipe to its end, with our output; returns its exit code.

    Raises:
        SystemExit: a signal came, which it was told, and it has ended.
    """
    command = [sys.executable, "-m", module, "--config", str(recipe), *flags]
    told = 0
    with stop.waiting(), subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        while process.poll() is None:
            if stop.received and not told:
                told = stop.received
                process.send_signal(told)
            time.sleep(POLL)
    code = int(process.returncode)
    if code in (exit_code(signal) for signal in StopSignals.SIGNALS):
        raise SystemExit(code)
    return code


def judge(folder: Path, costs: CostTable | None, held: Held) -> dict[str, Any]:
    """Figures of a trial's adapter by replay of the calibration text, with bounds for these costs.

    Trials are compared on the text that temperatures and bounds come from too, so that the held-out text, which the
    best one's card reports on, has chosen nothing.

    Args:
        costs: of this machine; None takes the bounds and figures of the fit, which counts costs in layers.
        held: bounds that the recipe fixes.
    """
    adapter = load_adapter(folder / "adapter")
    if costs is None:
        calibrated = json.loads((folder / "adapter" / CALIBRATION_FILE).read_text(encoding="utf-8"))
        figures = calibrated["fitted_on"]["replay"]
    else:
        table, weights = costs.for_head(adapter.heads.one.weights_read), adapter.config.weights_sha256
        traces = Traces.read(folder / "adapter" / TRACES_FILE, weights_sha256=weights)
        figures = tune(traces, table, held)[1].describe(table)
    names = ("mean_accepted_length", "acceptance_rate", "predicted_speedup", "predicted_speedup_interval")
    return {name: figures[name] for name in names}


def tidy(folder: Path) -> None:
    """Remove the checkpoints of a trial that is done."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
