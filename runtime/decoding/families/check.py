"""Whether a model can be driven layer by layer, and as which family. Knows no family by name."""

from dataclasses import replace
from typing import Any

from runtime.decoding.families.family import Family
from runtime.decoding.families.missing import missing_part, setting, variants
from runtime.decoding.families.table import FAMILIES
from runtime.decoding.wrappers import WRAPPERS
from runtime.errors import UnsupportedModel

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
    if text is config:
        return family
    wrapper = WRAPPERS[config.model_type]
    masked = wrapper.masked and text.use_bidirectional_attention == "vision"
    return replace(family, body=wrapper.body, scaled=wrapper.scaled, masked=masked)


def text_decoder(model: Any) -> Any:
    """The module that holds a supported model's decoder layers, embedding and final norm."""
    return model.get_submodule(family_of(model.config).body)


def own_attentions(model: Any) -> list[Any]:
    """The modules, one a layer, that attend on their own; none where layers go through transformers' interface."""
    family = family_of(model.config)
    if family.attention is None:
        return []
    return [getattr(layer, family.attention) for layer in getattr(text_decoder(model), family.layers)]


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
    if setting(text, "is_heterogeneous") and not family.differing:
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
    # Tokens of one picture may see each other: that is the prompt's forward, which is stock's.
    if getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision"):
        return "its tokens see those after them"
    if not getattr(text, "is_causal", True):
        return "its tokens see those after them"
    if getattr(text, "add_cross_attention", False) or getattr(text, "reorder_and_upcast_attn", False):
        return "it has cross-attention or upcast attention"
    parts = variants(text, linked=family.linked)
    return f"it has {' and '.join(parts)}" if parts else None


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
