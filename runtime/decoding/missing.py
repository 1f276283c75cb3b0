"""What a model that is not supported has, and SpecBound lacks. Read off the config; knows no family by name."""

from typing import Any

# Fields of configs that say what a model is made of, and the part that they speak of.
_PARTS = {
    "is_encoder_decoder": "an encoder beside the decoder",
    "kv_lora_rank": "latent attention",
    "ssm_cfg": "recurrent layers",
    "state_size": "recurrent layers",
    "mamba_d_state": "recurrent layers",
    "conv_L_cache": "convolutions between tokens",
}
_ATTENTION = ("full_attention", "sliding_attention")


def missing_part(config: Any) -> str:
    """The part of an unsupported model that nothing here drives, in a few words.

    Args:
        config: of transformers.
    """
    try:
        inner = config.get_text_config()
    except ValueError:  # transformers finds several
        return "it has several decoders"
    if inner is not config:
        return f"its decoder of text (model_type {inner.model_type!r}) is inside a model of several kinds of input"
    layer_types = getattr(config, "layer_types", None) or ()
    other = sorted({str(kind) for kind in layer_types} - set(_ATTENTION))
    parts = [part for field, part in _PARTS.items() if getattr(config, field, None)]
    if other:
        parts.append(f"layers of the kind {', '.join(other)}")
    if not parts:
        return "its layers are not known here"
    return f"it has {' and '.join(dict.fromkeys(parts))}"
