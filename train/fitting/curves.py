"""A picture of a fit from its log: loss, agreement by exit, accepted length. Knows nothing but `metrics.jsonl`."""

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a picture in a file, with or without a screen
from matplotlib import pyplot

from runtime.files import write_atomic
from train.fitting.log import read_log


def draw_curves(log: Path, picture: Path) -> None:
    """Draw the figures of every step of a log.

    Args:
        log: `metrics.jsonl`, whole lines.
        picture: a PNG file; written whole or not at all.
    """
    lines = read_log(log)
    figure, (left, middle, correct) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.plot(*_points(lines, "fit/loss"), label="fit", color="0.6", linewidth=1)
    for colour, layer in enumerate(_layers(lines)):
        left.plot(*_points(lines, f"held_out/loss/{layer}"), "o-", color=f"C{colour}", label=_exit(layer))
        middle.plot(*_points(lines, f"held_out/agreement/{layer}"), "o-", color=f"C{colour}", label=_exit(layer))
        middle.plot(*_points(lines, f"held_out/acceptance/{layer}"), "o:", color=f"C{colour}")
    left.set(title="loss, fit and held out", xlabel="step")
    middle.plot(*_points(lines, "held_out/chance"), color="0.6", label="chance")
    middle.set(title="agreement (dotted: expected acceptance)", xlabel="step", ylim=(0, 1))
    correct.plot(*_points(lines, "held_out/accepted_length"), "o-", label="mean accepted length")
    correct.plot(*_points(lines, "held_out/predicted_speedup"), "s--", label="predicted speed, by layer counts")
    correct.axhline(1, color="0.6", linewidth=1)
    correct.set(title="by replay of held-out text", xlabel="step")
    for axes in (left, middle, correct):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    pyplot.close(figure)
    write_atomic(picture, data.getvalue())


def _points(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in points], [value for _, value in points]


def _layers(lines: list[dict[str, Any]]) -> list[str]:
    return sorted({key.rpartition("/")[2] for line in lines for key in line if key.startswith("held_out/agreement/")})


def _exit(layer: str) -> str:
    return f"exit {int(layer.removeprefix('layer_'))}"
