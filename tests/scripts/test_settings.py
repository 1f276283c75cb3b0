"""docs/fitting.md holds every setting as the code has it."""

import dataclasses

from tests.helpers.paths import ROOT
from tests.helpers.scripts import script
from train.settings.fit_config import FitConfig


def test_the_table_is_made_from_the_code() -> None:
    """After a change of a setting run `python scripts/settings.py`."""
    assert (ROOT / "docs" / "fitting.md").read_text(encoding="utf-8") == script("settings").page()


def test_every_setting_has_its_line() -> None:
    """Needed ones, lists and choices in words."""
    page = script("settings").page()
    assert all(f"| `{one.name}` |" in page for one in dataclasses.fields(FitConfig) if one.init)
    assert "| `prompts` | list of texts | needed |" in page
    assert "| `learning_rate` | number | `0.001` |" in page
    assert "| `answers` | distil, keep | `distil` |" in page
    assert "| `sources` |" not in page
