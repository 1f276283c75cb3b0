"""Plots of calibration and replay, written to files."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from runtime.drafting.policy import SpeculationBounds
from runtime.drafting.temperature import TemperatureSchedule
from train.calibration.reliability import expected_calibration_error
from train.calibration.traces import LOOKUP_LAYER, Traces
from train.replay.replay import Replayer, Totals

matplotlib.use("agg")
from matplotlib import pyplot as plt

BINS = 12


def reliability_plot(traces: Traces, schedule: TemperatureSchedule, path: Path) -> None:
    """Plot the share of right drafts against confidence, before (T = 1) and after calibration, one panel per exit."""
    assert traces.uncalibrated is not None
    exits = [(row, layer) for row, layer in enumerate(traces.layers) if layer != LOOKUP_LAYER]
    figure, panels = plt.subplots(1, len(exits), figsize=(3.4 * len(exits), 3.6), sharey=True, squeeze=False)
    for panel, (row, layer) in zip(panels[0], exits, strict=True):
        panel.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
        correct = traces.correct[row, 0]
        for confidences, label, color in (
            (traces.uncalibrated, "T = 1", "tab:orange"),
            (traces.confidence, "calibrated", "tab:blue"),
        ):
            confidence = confidences[row, 0, 0]
            error = expected_calibration_error(confidence, correct)
            panel.plot(
                *_points(confidence, correct), "o-", markersize=3, color=color, label=f"{label}, ECE {error:.3f}"
            )
        panel.set(
            title=f"exit after layer {layer}, T = {schedule[layer]:.2f}",
            xlabel="confidence",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        panel.legend(fontsize=8, loc="upper left", frameon=False)
    panels[0][0].set_ylabel("share of drafts that are right")
    _save(figure, path)


def precision_plot(traces: Traces, bounds: SpeculationBounds, path: Path) -> None:
    """Plot precision against coverage of the drafts, one line per source; a dot marks the source's threshold."""
    figure, panel = plt.subplots(figsize=(5.2, 4.0))
    for row, layer in enumerate(traces.layers):
        confidence, hits = traces.confidence[row, 0, 0], traces.correct[row, 0]  # those of the first draft in a round
        order = np.argsort(-confidence, kind="stable")
        correct = np.cumsum(hits[order])
        count = np.arange(1, len(order) + 1)
        shown = count >= min(30, len(order))  # the first few are too noisy
        (line,) = panel.plot((count / len(order))[shown], (correct / count)[shown], label=_source(layer))
        taken = bounds.accepts(layer, confidence) & (layer <= bounds.max_exit_layer)
        if taken.any():
            panel.plot(taken.mean(), hits[taken].mean(), "o", color=line.get_color())
    panel.set(
        xlabel="share of positions drafted at", ylabel="share of drafts that are right", xlim=(0, 1), ylim=(0, 1)
    )
    panel.legend(fontsize=8, frameon=False, title="dots: the bounds chosen", title_fontsize=8)
    _save(figure, path)


def speed_plot(replayer: Replayer, bounds: SpeculationBounds, path: Path) -> None:
    """Plot predicted speed-up by draft length and exit threshold, the same at all exits; a star marks the best."""
    taus, widths = np.linspace(0.2, 0.9, 8), range(1, 9)
    speed = np.array(
        [
            [replayer.run(SpeculationBounds(float(tau), bounds.max_exit_layer, width)).speedup for tau in taus]
            for width in widths
        ]
    )
    figure, panel = plt.subplots(figsize=(6.0, 3.4))
    image = panel.pcolormesh(taus, list(widths), speed, cmap="viridis", shading="nearest")
    row, column = np.unravel_index(speed.argmax(), speed.shape)
    panel.plot(taus[column], row + 1, "r*", markersize=12)
    chosen = replayer.run(bounds).speedup
    panel.set(
        xlabel="exit_threshold, the same at every exit",
        ylabel="max_draft_tokens",
        title=f"best here {speed.max():.2f}x; bounds chosen {chosen:.2f}x",
    )
    panel.title.set_fontsize(9)
    figure.colorbar(image, label="predicted speed-up over stock")
    _save(figure, path)


def sources_plot(replayed: Totals, path: Path) -> None:
    """Plot drafted and accepted tokens by source, per 100 tokens emitted."""
    layers = sorted(replayed.drafted)
    share = 100.0 / replayed.emitted
    figure, panel = plt.subplots(figsize=(5.2, 0.5 * len(layers) + 1.4))
    drafted = [share * replayed.drafted[layer] for layer in layers]
    accepted = [share * replayed.accepted[layer] for layer in layers]
    panel.barh([_source(layer) for layer in layers], drafted, color="0.82", label="drafted")
    panel.barh([_source(layer) for layer in layers], accepted, color="tab:blue", label="accepted", height=0.5)
    panel.invert_yaxis()
    panel.set_xlabel("per 100 tokens emitted")
    panel.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def _source(layer: int) -> str:
    return "lookup" if layer == 0 else f"exit after layer {layer}"


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _points(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> tuple[list[float], list[float]]:
    parts = [part for part in np.array_split(np.argsort(confidence, kind="stable"), BINS) if len(part)]
    return [float(confidence[part].mean()) for part in parts], [float(correct[part].mean()) for part in parts]
