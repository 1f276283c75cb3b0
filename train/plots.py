"""Pictures of what was measured. Knows arrays and files, no models."""

from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

from runtime.temperature import TemperatureSchedule
from train.calibrate import Confidences, expected_calibration_error

matplotlib.use("agg")
from matplotlib import pyplot as plt

BINS = 12


def reliability_plot(found: Confidences, schedule: TemperatureSchedule, path: Path) -> None:
    """Confidence against share of right drafts, one panel an exit, before (T = 1) and after calibration."""
    layers = sorted(found.grid)
    before = found.at(TemperatureSchedule.none(layers))
    after = found.at(schedule)
    figure, panels = plt.subplots(1, len(layers), figsize=(3.4 * len(layers), 3.6), sharey=True, squeeze=False)
    for panel, layer in zip(panels[0], layers, strict=True):
        panel.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
        for sure, label, color in (
            (before[layer], "T = 1", "tab:orange"),
            (after[layer], "calibrated", "tab:blue"),
        ):
            error = expected_calibration_error(sure, found.right[layer])
            panel.plot(
                *_points(sure, found.right[layer]),
                "o-",
                markersize=3,
                color=color,
                label=f"{label}, ECE {error:.3f}",
            )
        panel.set(
            title=f"exit after layer {layer}, T = {schedule[layer]:.2f}",
            xlabel="confidence",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        panel.legend(fontsize=8, loc="upper left", frameon=False)
    panels[0][0].set_ylabel("share of drafts that are right")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _points(sure: NDArray[np.float32], right: NDArray[np.bool_]) -> tuple[list[float], list[float]]:
    parts = [part for part in np.array_split(np.argsort(sure, kind="stable"), BINS) if len(part)]
    return [float(sure[part].mean()) for part in parts], [float(right[part].mean()) for part in parts]
