"""What a model that is not supported has, and SpecBound lacks, by its config or class. Knows no family by name."""

import inspect
from typing import Any

from transformers import MODEL_MAPPING

from runtime.decoding.families.family import CACHE

# Fields of configs that say what a model is made of, and the part that they speak of.
_PARTS = {
    "is_encoder_decoder": "an encoder beside the decoder",
    "add_cross_attention": "cross-attention",
    "cross_layer_interval": "cross-attention",
    "cross_attention_layers": "cross-attention",
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
# What models of supported families may have, and those that are supported have not.
_LINKS = ("hidden_size_per_layer_input", "num_kv_shared_layers")
_BOTH_WAYS = "layers whose tokens see those after them"
_ATTENTION = ("full_attention", "sliding_attention")


def missing_part(text: Any, *, inside: bool) -> str:
    """The part of an unsupported decoder of text that nothing here drives, in a few words.

    Args:
        text: its config, of transformers.
        inside: it is one part of a model of several kinds of input.
    """
    parts = list(dict.fromkeys([*_named(text), *_layer_kinds(text)])) or _of_class(text)
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


def variants(text: Any, *, linked: bool) -> list[str]:
    """Parts that a decoder of a supported family has, and nothing here drives.

    Args:
        linked: as `Family` has it.
    """
    parts = [_PARTS[field] for field in ("alibi", *(() if linked else _LINKS)) if setting(text, field)]
    if setting(text, "word_embed_proj_dim") not in (None, setting(text, "hidden_size")):
        parts.append("an embedding of another size than its layers")
    if setting(text, "do_layer_norm_before") is False or setting(text, "_remove_final_layer_norm"):
        parts.append("no norm above its layers")
    return parts


def _of_class(text: Any) -> list[str]:
    """Parts that only the model's class speaks of."""
    try:
        body: Any = MODEL_MAPPING[type(text)]
        takes = inspect.signature(body.forward).parameters
    except Exception:  # a config that has no model of its own, or one whose libraries are not there
        return []
    if hasattr(body, "build_alibi_tensor"):
        return [_PARTS["alibi"]]
    return [] if CACHE in takes else ["no cache of keys and values"]


def _named(text: Any) -> list[str]:
    """The parts that single settings speak of."""
    parts = [part for field, part in _PARTS.items() if setting(text, field)]
    if setting(setting(text, "attn_config"), "alibi"):
        parts.append(_PARTS["alibi"])
    if setting(text, "decoder_layers") and not setting(text, "is_encoder_decoder"):
        parts.append(_PARTS["add_cross_attention"])
    if setting(text, "causal") is False or (setting(text, "is_decoder") is False and not parts):
        parts.append(_BOTH_WAYS)
    if setting(text, "num_layers") not in (None, setting(text, "num_hidden_layers")):
        parts.append("several attentions in a layer")
    return parts


def _layer_kinds(text: Any) -> list[str]:
    """The kinds of its layers that are neither full attention nor windows, as one part."""
    kinds = setting(text, "layer_types")
    other = sorted({str(kind) for kind in kinds} - set(_ATTENTION)) if isinstance(kinds, (list, tuple)) else []
    return [f"layers of the kind {', '.join(other)}"] if other else []
