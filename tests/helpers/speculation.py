"""One call of `generate` with speculation and without, for the tests that compare them."""

from collections.abc import Callable
from typing import Any

import torch

from runtime import SpeculationBounds, detach
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads

PROMPT = torch.tensor([[5, 17, 33, 8, 5, 17, 60]])
NEW_TOKENS = 24


def with_speculation(model: Any, truth: list[int], call: Callable[[], Any]) -> tuple[Any, SpecBound]:
    """Run with heads that are right two times of three."""
    heads = FakeHeads("mixed", [2, 4], truth, vocabulary=model.config.vocab_size)
    specbound = SpecBound(model, heads, SpeculationBounds(0.2, 4, 4))
    attach(model, specbound)
    try:
        torch.manual_seed(11)
        return call(), specbound
    finally:
        detach(model)


def both(model: Any, **options: Any) -> tuple[Any, Any, SpecBound]:
    """Plain and speculative output of one call, speculation with heads that know the plain one."""
    torch.manual_seed(11)
    stock = model.generate(**options)
    ids = stock if isinstance(stock, torch.Tensor) else stock.sequences
    found, specbound = with_speculation(model, ids[0].tolist(), lambda: model.generate(**options))
    return stock, found, specbound
