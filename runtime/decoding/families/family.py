"""`Family`: where a family of models keeps the parts that generation runs through, and what its layers are made of.

No modeling code is copied: a family is a line of data (`table.py`). Knows nothing of drafting, exits or files.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

# What models, `generate` and what it returns call their cache: "cache" from transformers 5.24 on.
CACHE = next((name for name in ("cache", "past_key_values") if hasattr(GenerateDecoderOnlyOutput, name)), "")
CACHE_LENGTH = f"{CACHE}_length"  # and how much it holds, where a module asks for that
# Names of a layer's norms: before attention, after it, before the gated part, after it; None where there is none.
Norms = tuple[str | None, str | None, str | None, str | None]
BEFORE: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
AFTER: Norms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND: Norms = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
# A norm's weight times numbers that are rounded to the base's dtype before; times those that are not; 1 + weight, too.
WEIGHINGS = ("rounded", "whole", "from_one")


@dataclass(frozen=True, slots=True)
class Family:
    """Where a model family keeps the parts that generation runs through.

    Attributes:
        norms: of a layer of the Llama kind, which `LayerParts` takes apart: attention with rotary positions, residual,
            gated part, residual, with norms at some of four places; None where layers are of another kind.
        weighing: how those norms weigh, one of `WEIGHINGS`.
        rounds_turns: rotary tables, and products with them, are rounded to the base's dtype before they are added.
        by_layer: each layer reads in the config's `layer_types` whether it has a window; others ask `sliding_window`.
        windows: its layers may have windows; attention gets to know, and tests go beyond them.
        rotary_by_layer: there is a rotary table for each kind of layer.
        thetas: there is one for each base that the config's `layer_rope_theta` names; 0 turns nothing.
        factor: field of the config by which logits are multiplied; without it `logits_scaling` divides them.
        scaled: logits are scaled and capped as the config says; wrappers leave that out.
        scales_states: what scales logits divides the normed states below the unembedding instead.
        root: field of the config that says whether embeddings are multiplied by the root of their size.
        normed: embeddings go through the final norm, too, before the first layer.
        attention: name in a layer of the module that attends on its own, past transformers' interface or over keys
            that it makes of what is cached: a block's rows go through the whole of it one by one, see `RowAttention`.
        masked: attention gets a mask of one row, too, that hides nothing.
        differing: its layers may differ in the number and size of heads.
        linked: as in Gemma 4 its last layers may read keys and values of layers before them, and each layer may have
            an input of its own of each token.
        unset: what layers take besides and have no default for, None where models are as those that are supported.
        offset: learned positions are asked for by name, with the first one; their module counts from elsewhere.
        axes: of the positions that the rotary module takes, 1 or as many as an image has; those of text are equal.
    """

    body: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    positions: str | None = None
    offset: tuple[str, ...] | None = None
    cache_argument: str = CACHE
    norms: Norms | None = None
    weighing: str = "rounded"
    rounds_turns: bool = True
    by_layer: bool = False
    windows: bool = False
    rotary_by_layer: bool = False
    thetas: bool = False
    factor: str | None = None
    scaled: bool = True
    scales_states: bool = False
    root: str | None = None
    normed: bool = False
    attention: str | None = None
    masked: bool = False
    differing: bool = False
    linked: bool = False
    unset: tuple[str, ...] = ()
    axes: int = 1

    def cache_name(self, module: Any) -> str:
        """What a layer, or its attention, calls its cache: older releases of transformers have other names for it."""
        takes = inspect.signature(type(module).forward).parameters
        return self.cache_argument if self.cache_argument in takes else CACHE
