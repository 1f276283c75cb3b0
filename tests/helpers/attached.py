"""A tiny model with an adapter, to which something is done, and whether its ids are still its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from runtime import SpeculationBounds
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads

PROMPT = torch.tensor([[5, 17, 33, 8, 5, 17, 60]])
GREEDY = {"max_new_tokens": 24, "do_sample": False}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "attention_bias": True, "mlp_bias": True}


def attached_model(make_model: Callable[..., Any]) -> Any:
    """A tiny base with random biases and norms, in bfloat16, with heads that are right two times of three."""
    made = make_model(**WIDE).to(torch.bfloat16)
    torch.manual_seed(3)
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter.data, mean=float("norm" in name), std=0.3)
    attach(made, SpecBound(made, FakeHeads("mixed", [2, 4], vocabulary=128), SpeculationBounds(0.2, 4, 4)))
    return made


def same(model: Any) -> bool:
    """Whether the ids are those of the same model with speculation off; whether it speculated is in its statistics."""
    with model.specbound.disabled():
        stock = model.generate(PROMPT, **GREEDY)
    model.specbound.stats.emitted = 0
    model.specbound.drafter.truth = stock[0].tolist()
    return torch.equal(model.generate(PROMPT, **GREEDY), stock)


def ids_of(model: Any) -> list[int]:
    """What it generates; for a process of its own."""
    torch.set_num_threads(1)
    found: list[int] = model.generate(PROMPT, **GREEDY)[0].tolist()
    assert speculated(model)
    return found


def speculated(model: Any) -> bool:
    """Whether the last call did."""
    return bool(model.specbound.stats.emitted)
