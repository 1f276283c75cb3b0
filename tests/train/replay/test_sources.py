"""Which sources draft, what is said of those that do not, and that a noisy minute switches no head off."""

from dataclasses import replace

import numpy as np
import pytest

from runtime import load_adapter
from runtime.drafting.policy import SpeculationBounds
from tests.helpers.paths import SHIPPED
from train.calibration.traces import TRACES_FILE, Traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer
from train.replay.search import OFF, tune
from train.replay.sources import idle, sources

COSTS = CostTable.read(SHIPPED / "costs.json")
CONFIG = load_adapter(SHIPPED).config
NOISY, RIGHT = 1.63, 1.11  # a block of two tokens over one of one, as a busy minute and a quiet one had it


@pytest.fixture(scope="module")
def traces() -> Traces:
    """Every sixtieth text of the shipped adapter's."""
    whole = Traces.read(SHIPPED / TRACES_FILE, weights_sha256=CONFIG.weights_sha256)
    return whole.of_sequences(np.arange(whole.num_sequences) % 60 == 0)


def test_a_noisy_profile_switches_no_head_off(traces: Traces) -> None:
    """Wider blocks cost as much as in a noisy minute; bounds chosen by that are nearly as fast in a quiet one."""
    one = COSTS.layer[1]
    noisy = replace(COSTS, layer={width: one * (1 if width == 1 else NOISY) for width in COSTS.layer})
    quiet = replace(COSTS, layer={width: one * (1 if width == 1 else RIGHT) for width in COSTS.layer})
    chosen, right = (tune(traces, costs, progress=False)[0] for costs in (noisy, quiet))
    assert chosen.exits(traces.layers) == right.exits(traces.layers) == [0, 2]
    replayer = Replayer(traces, quiet)
    assert replayer.run(chosen).speedup > 0.95 * replayer.run(right).speedup
    alone = replace(right, exit_thresholds={**right.exit_thresholds, 2: OFF})
    assert replayer.run(alone).speedup < 0.85 * replayer.run(right).speedup  # what switching it off would cost


def test_sources_that_are_never_asked_are_named(traces: Traces) -> None:
    """With what they would give; where no head is asked, a sentence says what that means."""
    said = sources(traces, COSTS, CONFIG.bounds)
    assert list(said) == ["lookup", "layer 2"] and all(one.startswith("in use, ") for one in said.values())
    assert not idle(said, "counted")
    shallow = sources(traces, COSTS, replace(CONFIG.bounds, max_exit_layer=0))
    assert shallow["layer 2"].startswith("never asked, ") and shallow["lookup"].startswith("in use, ")
    gain = shallow["layer 2"].split()
    assert float(gain[2][:-1]) > float(gain[-1][:-1])  # "never asked, 7.10x with it instead of 5.30x"
    assert idle(shallow, "counted").startswith("The head is never asked with these bounds: only the lookup drafts")
    for bounds in (SpeculationBounds(OFF, 2, 15), SpeculationBounds(0.1, 2, 0)):
        nothing = sources(traces, COSTS, bounds)
        assert all(one.startswith("never asked, ") for one in nothing.values())
        assert "nothing is drafted" in idle(nothing, "counted")
    several = {"lookup": "in use, 1", "layer 2": "never asked, 1", "layer 4": "never asked, 1"}
    assert idle(several, {"threads": 2}).startswith("None of the heads is ever asked")
    assert "specbound profile" in idle(several, "counted") and "profile" not in idle(several, {"threads": 2})
    assert not idle(several | {"layer 4": "in use, 1"}, "counted")
