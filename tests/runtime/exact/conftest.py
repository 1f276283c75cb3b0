"""A place for certificates, and packing on machines without oneDNN's operators."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from runtime.exact import packed
from runtime.exact.native.layout import Layout
from runtime.exact.native.library import native_library


@pytest.fixture
def own_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own for certificates; kernels are built where all tests find them."""
    native_library()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing on any machine: copies of the weights take the place of oneDNN's."""
    copied = Layout(
        "copied",
        lambda weights: torch.cat(list(weights)),
        lambda hidden, weight, bias, _: nn.functional.linear(hidden, weight, bias),
    )
    monkeypatch.setattr(packed, "has_onednn", lambda: True)
    monkeypatch.setattr(packed, "layout_of", lambda like, outputs: copied)
