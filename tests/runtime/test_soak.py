"""Long texts: 2,000 tokens with stock's ids, and memory that does not grow from one to the next."""

import gc
import resource
from typing import Any

import torch

from runtime import SpeculationBounds
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads

TOKENS = 2000


def peak_bytes() -> int:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def live_tensors() -> int:
    """Tensors that somebody still refers to."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_two_thousand_tokens(make_model: Any) -> None:
    """Same ids to the end; the second time no tensor more is alive, and the peak has not risen."""
    model = make_model(max_position_embeddings=4096, num_hidden_layers=3)
    options = {"inputs": torch.arange(3, 12)[None], "max_new_tokens": TOKENS, "do_sample": False}
    stock = model.generate(**options)
    heads = FakeHeads("mixed", [1, 2], stock[0].tolist(), vocabulary=128)
    attach(model, SpecBound(model, heads, SpeculationBounds(0.2, 2, 4)))
    peaks, alive = [], []
    for _ in range(2):
        assert torch.equal(model.generate(**options), stock)
        peaks.append(peak_bytes())
        alive.append(live_tensors())
    assert model.specbound.stats.emitted == TOKENS
    assert alive[1] == alive[0]
    assert peaks[1] - peaks[0] < 8_000_000
