"""What is kept of a token: its keys and values in all layers that have their own, read off the config."""

from typing import Any

from runtime.decoding.families.check import own_attentions
from runtime.decoding.families.table import FAMILIES

# What configs call the heads of keys and values, where these are fewer than those of queries.
_SHARED = ("num_key_value_heads", "num_kv_heads")


def layer_configs(text: Any) -> list[Any]:
    """Of each layer of a decoder of text, what its heads are read off: settings may differ from layer to layer."""
    count = text.num_hidden_layers
    if getattr(text, "is_heterogeneous", False):
        return [text.per_layer_config[index] for index in range(count)]
    return [text] * count


def layers_with_keys(config: Any) -> int:
    """Layers that keep keys and values, the first ones; those after them read what others keep."""
    text = config.get_text_config()
    return int(text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0))


def numbers_per_token(model: Any) -> int:
    """Numbers that a model's cache holds of each token; of one that is not supported as near as its config tells."""
    config = model.config.get_text_config()
    attentions = own_attentions(model) if config.model_type in FAMILIES else []
    if attentions and hasattr(attentions[0], "expand_kv"):  # keys and values are made anew of what they have in common
        return int(config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim))
    layers = layer_configs(config)[: layers_with_keys(config)]
    return sum(_heads(config, layer) * _sizes(config, layer) for layer in layers)


def _heads(config: Any, layer: Any) -> int:
    """Heads of keys and values in a layer."""
    queries = int(config.num_attention_heads)
    if getattr(config, "new_decoder_architecture", False) or getattr(config, "kv_lora_rank", None):
        return queries  # each gets a copy of what they share
    single = getattr(config, "multi_query", None)
    if single is not None:
        return 1 if single else queries
    shared = getattr(config, "attn_config", None)
    names = (getattr(layer, name, None) for name in _SHARED)
    return int(next(filter(None, names), None) or getattr(shared, "kv_n_heads", None) or queries)


def _sizes(config: Any, layer: Any) -> int:
    """Of a key and a value, together."""
    if getattr(config, "kv_lora_rank", None):
        return int(config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    named = getattr(layer, "head_dim", None) or getattr(config, "kv_channels", None)
    size = int(named or config.hidden_size // config.num_attention_heads)
    return size + int(getattr(layer, "v_head_dim", None) or size)
