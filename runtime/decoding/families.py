"""What each model family's layers look like. The only file that knows: the rest asks for parts by what they do.

No modeling code is copied: a family is a line that says where its modules are and what its layers call the cache.
Knows nothing of drafting, exits or files.
"""

from dataclasses import dataclass, replace
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

from runtime.decoding.missing import missing_part, setting
from runtime.decoding.wrappers import WRAPPERS
from runtime.errors import UnsupportedModel

# What models, `generate` and what it returns call their cache: "cache" from transformers 5.24 on.
CACHE = next((name for name in ("cache", "past_key_values") if hasattr(GenerateDecoderOnlyOutput, name)), "")
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
        factor: field of the config by which logits are multiplied; without it `logits_scaling` divides them.
        scaled: logits are scaled and capped as the config says; wrappers leave that out.
        axes: of the positions that the rotary module takes, 1 or as many as an image has; those of text are equal.
    """

    body: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    positions: str | None = None
    cache_argument: str = CACHE
    norms: Norms | None = None
    weighing: str = "rounded"
    rounds_turns: bool = True
    by_layer: bool = False
    windows: bool = False
    rotary_by_layer: bool = False
    factor: str | None = None
    scaled: bool = True
    axes: int = 1


FAMILIES = {
    "llama": Family(norms=BEFORE),
    "mistral": Family(norms=BEFORE, windows=True),
    "qwen2": Family(norms=BEFORE, by_layer=True, windows=True),
    "qwen3": Family(norms=BEFORE, by_layer=True, windows=True),
    "smollm3": Family(norms=BEFORE, by_layer=True, windows=True),
    "granite": Family(norms=BEFORE),
    "apertus": Family(),
    "arcee": Family(),
    "bitnet": Family(),
    "cohere": Family(factor="logit_scale"),
    "cohere2": Family(by_layer=True, windows=True, factor="logit_scale"),
    "cwm": Family(norms=BEFORE, by_layer=True, windows=True),
    "diffllama": Family(),
    "dots1": Family(by_layer=True, windows=True),
    "ernie4_5": Family(),
    "ernie4_5_moe": Family(),
    "exaone4": Family(by_layer=True, windows=True),
    "flex_olmo": Family(),
    "gemma": Family(norms=BEFORE, weighing="from_one"),
    "gemma2": Family(by_layer=True, windows=True),
    "gemma3_text": Family(norms=AROUND, weighing="from_one", by_layer=True, windows=True, rotary_by_layer=True),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": Family(),
    "gpt2": Family(body="transformer", embedding="wte", layers="h", norm="ln_f", rotary=None, positions="wpe"),
    "gpt_neox": Family(body="gpt_neox", embedding="embed_in", norm="final_layer_norm", cache_argument="layer_past"),
    "gpt_oss": Family(by_layer=True, windows=True),
    "granitemoe": Family(),
    "granitemoehybrid": Family(by_layer=True),
    "granitemoeshared": Family(),
    "helium": Family(),
    "hunyuan_v1_dense": Family(),
    "hunyuan_v1_moe": Family(),
    "hyperclovax": Family(factor="logits_scaling"),
    "jais2": Family(),
    "minimax_m2": Family(),
    "ministral": Family(norms=BEFORE, by_layer=True, windows=True),
    "ministral3": Family(windows=True),
    "mixtral": Family(windows=True),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(norms=AFTER, weighing="whole", rounds_turns=False),
    "olmo3": Family(
        norms=AFTER, weighing="whole", rounds_turns=False, by_layer=True, windows=True, rotary_by_layer=True
    ),
    "olmoe": Family(),
    "persimmon": Family(norm="final_layernorm"),
    "phi": Family(norm="final_layernorm"),
    "phi3": Family(norms=BEFORE, windows=True),
    "qwen2_moe": Family(by_layer=True, windows=True),
    "qwen2_vl_text": Family(norms=BEFORE, by_layer=True, windows=True, axes=3),
    "qwen2_5_vl_text": Family(norms=BEFORE, by_layer=True, windows=True, axes=3),
    "qwen3_moe": Family(windows=True),
    "qwen3_vl_text": Family(norms=BEFORE, axes=3),
    "qwen3_vl_moe_text": Family(axes=3),
    "seed_oss": Family(norms=BEFORE),
    "solar_open": Family(),
    "stablelm": Family(),
    "starcoder2": Family(windows=True),
}
# Rotary tables of these kinds depend on the position alone, so a block's rows equal one-by-one rows.
STEADY_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


def check_supported(model: Any) -> Family:
    """The family of `model`.

    Raises:
        UnsupportedModel: naming the architecture and the reason, where its layers cannot be driven one by one.
    """
    kind = type(model).__name__
    family = check_config(model.config, kind)
    try:
        model.get_submodule(family.body)
        whole = model.get_output_embeddings() is not None
    except AttributeError:
        whole = False
    if not whole:
        auto = "ImageTextToText" if model.config.model_type in WRAPPERS else "CausalLM"
        raise _unsupported(model.config, kind, f"it is no causal language model: load it with AutoModelFor{auto}")
    return family


def family_of(config: Any) -> Family:
    """The family of a supported model; of one inside a wrapper, with the place that it has there."""
    text = config.get_text_config()
    family = FAMILIES[text.model_type]
    return family if text is config else replace(family, body=WRAPPERS[config.model_type].body, scaled=False)


def text_decoder(model: Any) -> Any:
    """The module that holds a supported model's decoder layers, embedding and final norm."""
    return model.get_submodule(family_of(model.config).body)


def check_config(config: Any, kind: str | None = None) -> Family:
    """The family of a model, from its config alone: no weights are needed.

    Args:
        kind: what to call it in a message; by default what its config says.

    Raises:
        UnsupportedModel: as `check_supported`.
    """
    reason = _why_not(config)
    if reason is not None:
        raise _unsupported(config, kind, reason)
    return family_of(config)


def _why_not(config: Any) -> str | None:
    """Why a model of this config is not supported; None where it is."""
    try:
        text = config.get_text_config()
    except ValueError:  # transformers finds several
        return "it has several decoders"
    family = FAMILIES.get(text.model_type)
    if family is None:
        return missing_part(text, inside=text is not config)
    if text is not config and config.model_type not in WRAPPERS:
        around = "a model of several kinds of input that has not been described to SpecBound yet"
        return f"its decoder of text (model_type {text.model_type!r}) is inside {around}"
    return _why_not_text(text, family)


def _why_not_text(text: Any, family: Family) -> str | None:
    """Why a decoder of text of this family is not supported; None where it is."""
    if setting(text, "is_heterogeneous"):
        return "it has settings that differ from layer to layer"
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if not kinds <= ({"full_attention", "sliding_attention"} if family.by_layer else {"full_attention"}):
        return f"it has layers of the kinds {', '.join(sorted(kinds))}"
    if has_windows(text) and not family.windows:
        return "its layers have windows, which nobody has tried in this family"
    if has_windows(text) and not (text.sliding_window and getattr(text, "use_sliding_window", True)):
        return "its layer_types name windows, and its other settings none"
    rope = getattr(text, "rope_parameters", None) or {}
    tables = rope.values() if family.rotary_by_layer else [rope]
    for table in (table for table in tables if isinstance(table, dict)):  # beside tables there is what no layer reads
        if table.get("rope_type", "default") not in STEADY_ROPE:
            return f"its {table['rope_type']!r} rotary positions change with the length of the text"
    if getattr(text, "use_bidirectional_attention", False) or not getattr(text, "is_causal", True):
        return "its tokens see those after them"
    if getattr(text, "add_cross_attention", False) or getattr(text, "reorder_and_upcast_attn", False):
        return "it has cross-attention or upcast attention"
    return None


def _unsupported(config: Any, kind: str | None, why: str) -> UnsupportedModel:
    kind = kind or next(iter(getattr(config, "architectures", None) or []), type(config).__name__)
    return UnsupportedModel(
        f"{kind} (model_type {config.model_type!r}) is not supported, because {why}; plain decoding works"
    )


def has_windows(config: Any) -> bool:
    """Whether some layer sees the last tokens alone, as many as the config's `sliding_window`."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and FAMILIES[text.model_type].by_layer:
        return "sliding_attention" in kinds
    return getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
