"""ECE, Brier score and the bound on waste of a card, recomputed from the adapter's traces by other code.

They are of the held-out text, at the temperatures deployed, and equal to four digits.
"""

import json
import math
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from runtime import load_adapter
from tests.helpers.paths import SHIPPED


def bins_of_equal_mass(pairs, number=15):
    """(confidence, correct) pairs in order, in so many bins whose sizes differ by at most one, larger ones first."""
    ordered, bins = sorted(pairs, key=lambda pair: pair[0]), []
    small, larger = divmod(len(ordered), number)
    for index in range(number):
        size = small + (index < larger)
        bins.append(ordered[:size])
        ordered = ordered[size:]
    return [each for each in bins if each]


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def ece(pairs):
    gaps = (len(part) * abs(mean(c for c, _ in part) - mean(r for _, r in part)) for part in bins_of_equal_mass(pairs))
    return math.fsum(gaps) / len(pairs)


def p_value(loss, number, most):
    """Hoeffding-Bentkus, of "the loss is above `most`" (arXiv 2110.01052)."""
    if loss >= most:
        return 1.0
    low = max(loss, 1e-12)
    divergence = low * math.log(low / most) + (1 - low) * math.log((1 - low) / (1 - most))
    tail = sum(
        math.comb(number, k) * most**k * (1 - most) ** (number - k) for k in range(math.ceil(number * loss) + 1)
    )
    return min(1.0, math.exp(-number * divergence), math.e * tail)


def lowest_threshold(pairs, texts, most=0.25, chance=0.1):
    lowest = None
    for step in range(24):
        threshold, wasted = round(0.99 - 0.03 * step, 2), {}
        for (confidence, right), text in zip(pairs, texts, strict=True):
            if confidence >= threshold:
                wasted.setdefault(text, []).append(1 - right)
        if len(wasted) < 10:
            continue
        if p_value(mean(map(mean, wasted.values())), len(wasted), most) > chance:
            break
        lowest = threshold
    return lowest


def recomputed(file: Path) -> dict:
    tensors, found = load_file(file), {}
    texts = tensors["sequence"].tolist()
    for row, layer in enumerate(tensors["layers"].tolist()):
        right = (tensors["rank"][row, 0] == 0).astype(int).tolist()
        plain, sure = (
            list(zip(tensors[name][row, 0, 0].astype("float32").tolist(), right, strict=True))
            for name in ("uncalibrated", "sure")
        )
        found[str(layer)] = {
            "agreement": mean(right), "risk": lowest_threshold(sure, texts),
            "ece_before": ece(plain), "ece_after": ece(sure),
            "brier_before": mean((c - r) ** 2 for c, r in plain), "brier_after": mean((c - r) ** 2 for c, r in sure),
        }  # fmt: skip
    return found


@pytest.fixture(params=["fitted", "shipped"])
def adapter(request) -> Path:
    if request.param == "fitted":
        return Path(request.getfixturevalue("fitted"))
    if not (SHIPPED / "held_out.safetensors").exists():
        pytest.skip("the shipped adapter was fitted before held-out traces were kept")
    return SHIPPED


def test_figures_are_those_of_the_held_out_traces(adapter):
    calibrated = json.loads((adapter / "calibration.json").read_text())
    found, config = recomputed(adapter / "held_out.safetensors"), load_adapter(adapter).config
    for layer, told in calibrated["exits"].items():
        assert told["temperature"] == config.temperatures[int(layer)]
        assert told["risk"]["threshold"] == found[layer]["risk"]
        for name in ("agreement", "ece_before", "ece_after", "brier_before", "brier_after"):
            assert told[name] == pytest.approx(found[layer][name], abs=5e-5), (layer, name)
    others = recomputed(adapter / "traces.safetensors")  # negative control: the text that temperatures were chosen on
    layer = next(iter(calibrated["exits"]))
    assert calibrated["exits"][layer]["brier_after"] != pytest.approx(others[layer]["brier_after"], abs=5e-5)
