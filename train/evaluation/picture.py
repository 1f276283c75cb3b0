"""Plots of a benchmark: speed by task, sources of the tokens, and predicted against measured speed."""

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from runtime.files import write_atomic

matplotlib.use("agg")
from matplotlib import pyplot as plt


def picture(report: dict[str, Any], path: Path) -> None:
    """Plot a benchmark's report to a file, in up to three panels."""
    predicted = any("predicted_speedup" in one for one in report["methods"].values())
    groups = {**report["by_task"], "overall": report["methods"]}
    speculates = any("exits" in one for one in report["methods"].values())
    rows = 1 + speculates
    figure = plt.figure(figsize=(max(8.0, 1.5 * len(groups)), 3.6 * rows))
    grid = figure.add_gridspec(rows, 3)
    _speed(figure.add_subplot(grid[0, :]), report, groups)
    if speculates:
        _sources(figure.add_subplot(grid[1, : 2 if predicted else 3]), groups)
    if predicted:
        _predictions(figure.add_subplot(grid[1, 2]), report)
    figure.tight_layout()
    write_atomic(path, partial(figure.savefig, format="png", dpi=130, metadata={"Software": None}))
    plt.close(figure)


def _speed(panel: Any, report: dict[str, Any], groups: dict[str, Any]) -> None:
    """Plot the speed over stock with 95 % intervals, one bar per method. A hatched method changed ids."""
    names = [name for name in report["methods"] if name != "stock"]
    width = 0.85 / max(1, len(names))
    for index, name in enumerate(names):
        speed = np.array([group[name]["speedup_over_stock"] for group in groups.values()])
        bounds = np.array([group[name]["speedup_over_stock_interval"] for group in groups.values()]).T
        whole = report["methods"][name]["identical_prompts"] == report["methods"][name]["prompts"]
        panel.bar(
            np.arange(len(groups)) + (index - (len(names) - 1) / 2) * width,
            speed,
            width,
            yerr=np.maximum(0.0, [speed - bounds[0], bounds[1] - speed]),
            label=name if whole else f"{name} (ids differ)",
            hatch=None if whole else "//",
            error_kw={"linewidth": 0.7},
        )
    panel.axhline(1.0, color="0.4", linewidth=1)
    panel.set_xticks(np.arange(len(groups)), list(groups))
    panel.set_ylabel("times stock generate's speed")
    panel.set_title(f"{report['hardware']}, {report['dtype']}, {report['threads']} threads", fontsize=9)
    panel.legend(fontsize=8, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _sources(panel: Any, groups: dict[str, Any]) -> None:
    """Plot the share of tokens that came from each source, for `specbound` or else the first method that drafts."""
    overall = groups["overall"]
    name = "specbound" if "specbound" in overall else next(name for name in overall if "exits" in overall[name])
    layers = sorted({int(layer) for group in groups.values() for layer in group[name]["exits"]})
    bottom = np.zeros(len(groups))
    for layer in layers:
        accepted = [group[name]["exits"].get(str(layer), {"accepted": 0})["accepted"] for group in groups.values()]
        share = 100 * np.array(accepted) / np.array([group[name]["tokens"] for group in groups.values()])
        label = "lookup" if layer == 0 else f"exit after layer {layer}"
        panel.bar(list(groups), share, 0.6, bottom=bottom, label=label)
        bottom += share
    panel.bar(list(groups), 100 - bottom, 0.6, bottom=bottom, color="0.88", label="the target itself")
    panel.set(ylabel=f"% of tokens ({name})", ylim=(0, 100))
    panel.tick_params(axis="x", labelsize=8)
    panel.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _predictions(panel: Any, report: dict[str, Any]) -> None:
    """Plot measured against predicted speed-up without the prompt's forward, one point per method and task."""
    highest = 1.0
    for name, overall in report["methods"].items():
        if "predicted_speedup" not in overall:
            continue
        points = [group[name] for group in report["by_task"].values()]
        x = [point["predicted_speedup"] for point in points]
        y = [point["speedup_over_stock_after_the_prompt"] for point in points]
        panel.plot(x, y, "o", markersize=4, label=name)
        highest = max(highest, *x, *y)
    line = np.array([0.9, 1.05 * highest])
    panel.plot(line, line, color="0.5", linewidth=1)
    panel.fill_between(line, 0.9 * line, 1.1 * line, color="0.9", zorder=0, label="within 10 %")
    panel.set(xlabel="predicted speed-up", ylabel="measured")
    panel.legend(fontsize=7, frameon=False)
