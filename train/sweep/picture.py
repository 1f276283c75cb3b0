"""A picture of a sweep: its figure trial by trial, and against each setting that varied."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

COLUMNS = 3


def picture(trials: Sequence[dict[str, Any]], objective: str, label: str, path: Path) -> None:
    """Draw a panel of all trials in their order, and one for each setting; a star is the best.

    Args:
        trials: best first, as in `Results`.
        objective: the figure that is drawn; `label` says what it is.
    """
    names = list(trials[0]["settings"])
    rows = -(-(1 + len(names)) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 3.2 * rows), sharey=True, squeeze=False)
    panels = list(grid.flat)
    _in_order(panels[0], trials, objective)
    for panel, name in zip(panels[1:], names, strict=False):
        _against(panel, trials, objective, name)
    for panel in panels[1 + len(names) :]:
        panel.set_visible(False)
    figure.supylabel(label, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _in_order(panel: Any, trials: Sequence[dict[str, Any]], objective: str) -> None:
    """Each trial, with its interval over texts where it has one, and the best up to it."""
    order = sorted(trials, key=lambda trial: trial["number"])
    numbers, values = [trial["number"] for trial in order], np.array([trial[objective] for trial in order])
    panel.step(numbers, np.maximum.accumulate(values), where="post", color="tab:orange", label="best so far")
    if f"{objective}_interval" in trials[0]:
        ends = np.array([trial[f"{objective}_interval"] for trial in order]).T
        errors = np.maximum(0.0, [values - ends[0], ends[1] - values])
        panel.errorbar(numbers, values, errors, fmt="none", ecolor="0.8", zorder=0, label="95 % of texts")
    panel.plot(numbers, values, "o", markersize=4, color="tab:blue")
    panel.plot(trials[0]["number"], trials[0][objective], "r*", markersize=12)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("trial")
    panel.legend(fontsize=8, frameon=False)


def _against(panel: Any, trials: Sequence[dict[str, Any]], objective: str, name: str) -> None:
    """Each trial over its value of a setting; what is no number stands side by side, in order."""
    values = [trial["settings"][name] for trial in trials]
    if all(isinstance(value, int | float) for value in values):
        places = [float(value) for value in values]
        if min(places) > 0 and max(places) >= 5 * min(places):
            panel.set_xscale("log")
    else:
        kinds = sorted({str(value): value for value in values}.items(), key=lambda item: item[1])
        texts = [text for text, _ in kinds]
        places = [float(texts.index(str(value))) for value in values]
        panel.set_xticks(range(len(texts)), texts)
        panel.set_xlim(-0.5, len(texts) - 0.5)
    panel.plot(places, [trial[objective] for trial in trials], "o", markersize=4, color="tab:blue")
    panel.plot(places[0], trials[0][objective], "r*", markersize=12)
    panel.set_xlabel(name)
