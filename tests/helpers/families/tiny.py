"""Tiny random models of every family that is supported, and a prompt for them."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.helpers.families.shapes import FAMILIES, FURTHER, MIXTURES, SHAPE, TURNED, VOCABULARY
from tests.helpers.families.windows import WINDOWS


def tiny(
    family: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None, window: int | None = None
) -> PreTrainedModel:
    """A random model whose greedy output wanders; biases, norms and scales are random too.

    Args:
        attention: by default sdpa, or eager where the family has no other.
    """
    config = config_of(family, window)
    check_size(family, window)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=dtype
    ).eval()
    randomise(model)
    model.generation_config.pad_token_id = 0
    return model


def config_of(family: str, window: int | None = None) -> Any:
    """Of a tiny model; with a window where that is given."""
    if family in FAMILIES and window is None:
        return FAMILIES[family]
    kind = model_type(family)
    own = (FURTHER | MIXTURES | TURNED)[family] if window is None else WINDOWS[family] | {"sliding_window": window}
    shape = SHAPE | own
    if not hasattr(CONFIG_MAPPING[kind](), "num_key_value_heads"):  # it would keep what it does not know
        shape.pop("num_key_value_heads")
    return AutoConfig.for_model(kind, **shape)


@cache
def check_size(family: str, window: int | None) -> None:
    """Without memory, once: building a model takes longer than what most tests do with it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(family, window))
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size < 1e6, f"{family} has {size:,} parameters: a size was left at its default"


def require(family: str) -> None:
    """Skip where this transformers has no such family."""
    if model_type(family) not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")


def model_type(family: str) -> str:
    """The first word; others tell apart what one type has several of."""
    return family.partition(" ")[0]


def randomise(model: nn.Module) -> None:
    """Add noise to what starts as all zeros or ones, so that a part that is left out shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.2)


def prompt(length: int = 7) -> torch.Tensor:
    """Token ids, shape [1, length]."""
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
