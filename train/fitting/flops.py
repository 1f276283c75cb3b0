"""Floating-point operations of a fit, counted from shapes: real models, or models without memory (`meta`).

A multiplication and an addition are two. Knows no steps and no clock.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from runtime.decoding.families import layer_configs
from runtime.drafting.heads import ExitHeads
from train.features.weights import idle_parameters, text_parameters, text_parts

# Dense bfloat16 operations a second, as the vendors state them; matched against the device's name, longest first.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True, slots=True)
class FitFlops:
    """Operations of a base and its heads.

    Attributes:
        base_per_token: the base's body on one token of text, attention's scores left out; of many experts the few
            that a token is sent to.
        attention_per_pair: scores and sums of one token with one it attends to, over all layers.
        choice_per_position: the base's logits at one response position.
        heads_per_position: all heads at one response position, forward and backward.
    """

    base_per_token: int
    attention_per_pair: int
    choice_per_position: int
    heads_per_position: int

    @classmethod
    def of(cls, model: Any, heads: ExitHeads) -> "FitFlops":
        """Of a base with its heads."""
        config = model.config.get_text_config()
        hidden, vocab_size = config.hidden_size, config.vocab_size
        matrices = sum(parameter.numel() for parameter in text_parameters(model) if parameter.dim() > 1)
        matrices -= sum(module.weight.numel() for module in text_parts(model) if isinstance(module, nn.Embedding))
        matrices -= idle_parameters(model)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        body = matrices - (0 if tied else model.get_output_embeddings().weight.numel())
        heads_of = getattr(config, "num_attention_heads", 1)
        sizes = [getattr(layer, "head_dim", None) or hidden // heads_of for layer in layer_configs(config)]
        return cls(
            base_per_token=2 * body,
            attention_per_pair=4 * heads_of * sum(sizes),
            choice_per_position=2 * hidden * vocab_size,
            heads_per_position=sum(head.fit_flops for head in heads),
        )

    def base(self, tokens: int, positions: int, pairs: int) -> int:
        """The base's forward: `tokens` of text, `positions` of them answers, `pairs` of a token and one before it."""
        return tokens * self.base_per_token + pairs * self.attention_per_pair + positions * self.choice_per_position

    def heads(self, positions: int) -> int:
        """Forward and backward of the heads."""
        return positions * self.heads_per_position


def peak_flops(device_name: str) -> float | None:
    """Operations a second of a device by its name, or None where it is not known."""
    names = sorted((name for name in PEAK_FLOPS if name in device_name), key=len)
    return PEAK_FLOPS[names[-1]] if names else None
