"""Packing on machines without oneDNN's operators."""

import pytest
from torch import nn

from runtime.exact import packed


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing on any machine: copies of the weights take the place of oneDNN's."""
    monkeypatch.setattr(packed, "_has_operators", lambda: True)
    monkeypatch.setattr(packed, "reorder", lambda weight: weight.clone())
    monkeypatch.setattr(packed, "multiply", nn.functional.linear)
