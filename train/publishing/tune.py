"""Choose an adapter's speculation bounds again, for the costs of one machine, and rewrite its folder.

The traces of the fit, or of another workload, are replayed with those costs. The search is in `train.replay.search`,
the measurement of costs in `train.replay.profile`.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from runtime import DataError
from runtime.adapter.folder import Adapter, load_adapter, save_adapter
from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import HELD_OUT_FILE, TRACES_FILE, Traces
from train.publishing.assembly import write_replayed
from train.publishing.contents import BENCH_FILE, CALIBRATION_FILE, SPEED_FILE, write_custom_generate
from train.replay.costs import CostTable
from train.replay.replay import Replayer
from train.replay.search import Held, cross_fitted, tune
from train.replay.sources import sources
from train.replay.together import together
from train.replay.variants import ablate

COSTS_FILE = "costs.json"


def tune_adapter(
    folder: Path, costs: CostTable, held: Held, *, traces: Traces | None = None, requests: int = 1
) -> dict[str, Any]:
    """Choose bounds for these costs and write them, the evidence and the card into an adapter's folder.

    The bounds that the adapter has are kept where none are found that beat them. What is told of them is of the
    held-out text that the adapter carries, or of the workload.

    Args:
        traces: traces of a workload; by default those logged when the adapter was fitted.
        requests: that decode together where the bounds shall be the fastest.

    Returns:
        JSON values: `before` and `after`, each with its `bounds` and their predicted speed for one request;
        `cross_fitted_speedup`, predicted on texts that were not used to choose bounds; what each of the `sources` is
        worth; and for several requests `together` what drafts are.

    Raises:
        DataError: the folder has no traces, or they do not belong to the adapter.
        AdapterError: the folder is not an adapter, or cannot be written.
    """
    adapter = tunable(folder, costs)
    workload, reported = traces, traces
    if traces is None:
        traces = Traces.read(folder / TRACES_FILE, weights_sha256=adapter.config.weights_sha256)
    if reported is None:  # an adapter of before has no other text
        path = folder / HELD_OUT_FILE
        reported = Traces.read(path, weights_sha256=adapter.config.weights_sha256) if path.exists() else traces
    if set(traces.layers) - {0} != set(adapter.config.exit_layers):
        raise DataError(f"{folder}: traces and adapter have different exits: fit again")
    before = adapter.config.bounds
    as_before = Replayer(traces, costs, requests).run(before)
    after, replayed = tune(traces, costs, held, requests=requests)
    if held == Held() and as_before.speedup > replayed.speedup:
        after = before
    on = Replayer(reported, costs)
    summary = {
        "before": _described(before, on.run(before).describe(costs)),
        "after": _described(after, on.run(after).describe(costs)),
        "cross_fitted_speedup": cross_fitted(traces, costs, held, requests=requests),
        "sources": sources(reported, costs, after),
        "together": together(reported, costs, after),
    }
    if workload is not None:
        summary["replayed_on"] = "the prompts that the bounds were chosen on"
    _rewrite(folder, replace(adapter, config=replace(adapter.config, bounds=after)), reported, costs, summary)
    return summary


def tunable(folder: Path, costs: CostTable) -> Adapter:
    """The adapter of a folder that can be tuned with these costs.

    Raises: see `tune_adapter`.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give a local copy of the adapter that can be written")
    adapter = load_adapter(folder)
    costs.check_layers(adapter.config.num_hidden_layers, str(folder))
    return adapter


def _described(bounds: SpeculationBounds, predicted: dict[str, Any]) -> dict[str, Any]:
    fields = asdict(bounds)
    fields["exit_thresholds"] = {str(layer): value for layer, value in bounds.exit_thresholds.items()}
    return {"bounds": fields} | predicted


def _rewrite(folder: Path, adapter: Adapter, traces: Traces, costs: CostTable, summary: dict[str, Any]) -> None:
    """Replace the folder atomically by one with other bounds; speeds measured with the old bounds are left out."""
    calibrated = json.loads((folder / CALIBRATION_FILE).read_text(encoding="utf-8"))
    calibrated |= {
        "replay": {key: value for key, value in summary["after"].items() if key != "bounds"},
        "ablations": ablate(traces, adapter.config.bounds, costs),
        "sources": summary["sources"],
        "tuned": summary,
    }

    def others(unfinished: Path) -> None:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (SPEED_FILE, BENCH_FILE) and not (unfinished / path.name).exists():
                shutil.copyfile(path, unfinished / path.name)
        write_custom_generate(unfinished)
        costs.write(unfinished / COSTS_FILE)
        write_replayed(unfinished, traces, costs, adapter.config, calibrated)

    save_adapter(adapter, folder, extra=others)
