"""Packing on machines without oneDNN's operators."""

import pytest
from torch import Tensor, nn

from runtime.exact import packed
from runtime.exact.native.layout import Layout


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing on any machine: copies of the weights take the place of oneDNN's."""
    copied = Layout("copied", Tensor.clone, lambda hidden, weight, bias, _: nn.functional.linear(hidden, weight, bias))
    monkeypatch.setattr(packed, "has_onednn", lambda: True)
    monkeypatch.setattr(packed, "layout_of", lambda like, outputs: copied)
