"""What a model that is not supported has, and SpecBound lacks. Read off the config; knows no family by name."""

from typing import Any

# Fields of configs that say what a model is made of, and the part that they speak of.
_PARTS = {
    "is_encoder_decoder": "an encoder beside the decoder",
    "add_cross_attention": "cross-attention",
    "cross_layer_interval": "cross-attention",
    "cross_attention_layers": "cross-attention",
    "kv_lora_rank": "latent attention",
    "index_topk": "attention to keys that an index picks",
    "index_topk_blocks": "attention to keys that an index picks",
    "num_hashes": "attention to keys that a hash picks",
    "keep_window_size": "attention to keys that a mask of its own picks",
    "attention_layers": "layers of local attention",
    "ssm_cfg": "recurrent layers",
    "state_size": "recurrent layers",
    "mamba_d_state": "recurrent layers",
    "attention_hidden_size": "recurrent layers",
    "chunkwise_kernel": "recurrent layers",
    "mem_len": "a memory of the texts before",
    "conv_L_cache": "convolutions between tokens",
    "alibi": "positions that are biases of attention",
    "position_bias_num_buckets": "positions that are biases of attention",
    "layer_rope_theta": "rotary positions that differ from layer to layer",
    "num_attention_heads_per_layer": "heads that differ in number from layer to layer",
    "hidden_size_per_layer_input": "inputs of their own for each layer",
    "num_kv_shared_layers": "layers that share keys",
    "altup_num_inputs": "several hidden states a token",
    "H_cycles": "layers that run several times",
    "patcher_config": "tokens that are patches of bytes",
    "num_codebooks": "several tokens at a position",
    "vision_config": "towers for other kinds of input around its layers",
    "vlm_config": "a decoder for each kind of input",
    "is_heterogeneous": "settings that differ from layer to layer",
}
_ATTENTION = ("full_attention", "sliding_attention")


def missing_part(text: Any, *, inside: bool) -> str:
    """The part of an unsupported decoder of text that nothing here drives, in a few words.

    Args:
        text: its config, of transformers.
        inside: it is one part of a model of several kinds of input.
    """
    parts = list(dict.fromkeys([*_named(text), *_layer_kinds(text)]))
    whose = f"its decoder of text (model_type {text.model_type!r})" if inside else "it"
    if parts:
        return f"{whose} has {' and '.join(parts)}"
    whose = f"the layers of {whose}" if inside else "the layers of this family"
    return f"{whose} have not been described to SpecBound yet"


def setting(config: Any, name: str) -> Any:
    """A setting of a config, None where it has none; True where it cannot say, as layers differ in it."""
    try:
        return getattr(config, name, None)
    except Exception:  # configs compute settings, and each may have errors of its own
        return True


def _named(text: Any) -> list[str]:
    """The parts that single settings speak of."""
    parts = [part for field, part in _PARTS.items() if setting(text, field)]
    table = setting(text, "attn_config")
    return [*parts, _PARTS["alibi"]] if setting(table, "alibi") else parts


def _layer_kinds(text: Any) -> list[str]:
    """The kinds of its layers that are neither full attention nor windows, as one part."""
    kinds = setting(text, "layer_types")
    other = sorted({str(kind) for kind in kinds} - set(_ATTENTION)) if isinstance(kinds, (list, tuple)) else []
    return [f"layers of the kind {', '.join(other)}"] if other else []
