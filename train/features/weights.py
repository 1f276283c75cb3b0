"""Which of a base's weights a token of text runs through: not all experts of a mixture, and no tower of a wrapper.

Counted from shapes: models on `meta` will do. Knows no heads.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from runtime.decoding.wrappers import text_modules
from runtime.exact.execution import mixtures


def active_parameters(model: Any) -> int:
    """Parameters that a token of text may run through: of many experts those it is sent to, of a wrapper no towers."""
    return sum(parameter.numel() for parameter in text_parameters(model)) - idle_parameters(model)


def idle_parameters(model: Any) -> int:
    """Parameters of the experts that a token passes by, in all layers."""
    idle, config = 0, model.config.get_text_config()
    for mixture in mixtures(model):
        experts: Any = getattr(mixture, "experts", mixture)
        number = getattr(experts, "num_experts", None) or config.num_local_experts
        router = getattr(experts, "router", None)
        choosing = set() if router is None else set(router.parameters())
        for parameter in set(experts.parameters()) - choosing:
            if parameter.dim() > 1:  # experts lie along its first dimension
                idle += parameter.numel() // number * (number - experts_per_token(config))
    return idle


def mixed_parameters(model: Any) -> int:
    """Parameters of mixtures of experts that a token runs through, in all layers: a block takes these row by row."""
    mixed = {id(each): each for mixture in mixtures(model) for each in mixture.parameters()}
    return sum(parameter.numel() for parameter in mixed.values()) - idle_parameters(model)


def experts_per_token(config: Any) -> int:
    """How many experts of a mixture take a token; the most, where layers differ."""
    names = ("num_experts_per_tok", "moe_topk", "top_k_experts")
    given = (
        next((each for name in names if (each := getattr(config, name, None))), None) or config.ffn_config.moe_top_k
    )
    return max(given) if isinstance(given, list) else int(given)


def text_parameters(model: Any) -> Iterable[nn.Parameter]:
    """Parameters of all that text may run through, each once."""
    return {id(each): each for part in text_parts(model) for each in part.parameters(recurse=False)}.values()


def text_parts(model: Any) -> list[nn.Module]:
    """The modules that text may run through: all but a wrapper's towers."""
    return [module for _, module in text_modules(model)]
