"""What a card tells a stranger: sources that never draft, predictions beside measurements, no words of our own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime.adapter.folder import load_adapter
from tests.helpers.paths import SHIPPED
from train.publishing import assembly
from train.publishing.assembly import add_speed
from train.publishing.evidence import summary
from train.publishing.tune import tune_adapter
from train.replay.costs import CostTable
from train.replay.search import Held

COSTS = CostTable.counted(6, head=0.3, unembedding=2.0)
NONE = "None of the heads is ever asked with these bounds"


def test_a_fit_and_its_card_say_that_no_head_is_asked(
    fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends with what is predicted, what drafts, and what to do."""
    monkeypatch.setattr(assembly, "Held", lambda *given: Held(max_exit_layer=0))  # as where no head pays
    caplog.set_level("INFO")
    folder, _ = fit(tmp_path)
    said, card = caplog.text, (folder / "adapter" / "README.md").read_text()
    calibrated = json.loads((folder / "adapter" / "calibration.json").read_text())
    length = calibrated["replay"]["mean_accepted_length"]
    assert f"stock generate, mean accepted length {length:.2f}" in said and "counted in layers, not measured" in said
    assert "layer 2 never asked, " in said and "layer 4 never asked, " in said and f"warning: {NONE}" in said
    assert "- layer 4: never asked, " in card and f"**{NONE}" in card
    assert "drafts: " in summary(calibrated) and NONE in summary(calibrated)


def test_a_tuned_card_says_what_is_asked(fitted: Path, tmp_path: Path) -> None:
    """Every source with its worth; the warning comes and goes with the bounds."""
    shutil.copytree(fitted, tmp_path / "adapter")
    for held, missing in ((Held(max_exit_layer=0), True), (Held(0.0, 4, 3), False)):
        found = tune_adapter(tmp_path / "adapter", COSTS, held)
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert all(f"- {name}: {said}\n" in card for name, said in found["sources"].items())
        assert (NONE in card) == missing


def test_predicted_beside_measured(fitted: Path, tmp_path: Path) -> None:
    """In the card of the demo."""
    shutil.copytree(fitted, tmp_path / "adapter")
    speed = {"speedup": 1.51, "mean_accepted_length": 1.74, "acceptance_rate": 0.42, "prompts": 4}
    speed |= {"specbound_tokens_per_second": 15.1, "stock_tokens_per_second": 10.0, "identical_prompts": 4}
    add_speed(tmp_path / "adapter", speed | {"hardware": "A machine", "dtype": "bfloat16", "threads": 2, "tokens": 64})
    card = (tmp_path / "adapter" / "README.md").read_text()
    replayed = json.loads((tmp_path / "adapter" / "calibration.json").read_text())["replay"]
    assert f"| times stock `generate` | {replayed['predicted_speedup']:.2f} | 1.51 |" in card
    assert f"| tokens a round | {replayed['mean_accepted_length']:.2f} | 1.74 |" in card
    assert "15.1 tokens/s against 10.0 of stock `generate`; 4 of 4 prompts" in card


@pytest.mark.parametrize("adapter", sorted(SHIPPED.parent.iterdir()), ids=lambda folder: folder.name)
def test_the_card_is_in_plain_words(adapter: Path) -> None:
    """Figures with their meaning, bounds that are in force, and nothing that only a reader of the code knows."""
    card, config = (adapter / "README.md").read_text(), load_adapter(adapter).config
    for unknown in ("head_weights", "contexts [", "not stated", "survival stop", "depth-0"):
        assert unknown not in card
    for told in ("0 is perfect; as a rule of thumb up to 0.02 is good", "`model.generate_batch`", "this fit chose"):
        assert told in card
    for name in ("max_branches", "sure_threshold", "min_survival", "min_draft_survival", "max_draft_tokens"):
        assert f"| `{name}` | {getattr(config.bounds, name):g} |" in card
    assert "- layer 2: in use, " in card and "- lookup: in use, " in card
