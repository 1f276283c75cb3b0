"""Packed Linears where this machine's oneDNN has no bfloat16: a copy of the weight in the place of a packed one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from runtime.exact import packed
from runtime.exact.execution import call_in_rows
from runtime.exact.native.layout import ONEDNN


def copied(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """In the place of oneDNN's layout; like it, it does not follow what is written to the weight."""
    return weight.clone()


def multiplied(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, *ignored: Any) -> torch.Tensor:
    """In the place of oneDNN's product: each row alone, for small products of blocks have other bits now and then."""
    return call_in_rows(nn.functional.linear, 1, hidden, weight=weight, bias=bias)


def pretend_to_pack(monkeypatch: pytest.MonkeyPatch, *, min_weights: int = 1) -> None:
    """Linears of bfloat16 with so many weights are packed, on any machine."""
    monkeypatch.setattr(packed, "has_onednn", lambda: True)
    monkeypatch.setattr(packed, "layout_of", lambda like, outputs: ONEDNN)
    monkeypatch.setattr(packed, "MIN_WEIGHTS", min_weights)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", copied, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", SimpleNamespace(default=multiplied), raising=False)
