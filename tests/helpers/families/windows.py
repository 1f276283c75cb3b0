"""Configurations of tiny models whose layers have windows."""

from typing import Any

from tests.helpers.families.shapes import FURTHER, GEMMA4, LAYERS, LOCAL, MIXTURES

# Windows, in half of the layers where a family can have both.
HALF: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2)}
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "ministral3": FURTHER["ministral3"],
    "mixtral": LOCAL,
    "phi3": {},
    "starcoder2": {},
    "afmoe": MIXTURES["afmoe"] | HALF,
    "cohere2": HALF | {"logit_scale": 0.3},
    "cohere2_moe": MIXTURES["cohere2_moe"] | HALF,
    "cwm": HALF | {"head_dim": 12},
    "dots1": MIXTURES["dots1"] | HALF,
    "exaone4": HALF,
    "exaone_moe": MIXTURES["exaone_moe"] | HALF,
    "flint": MIXTURES["flint"] | HALF,
    "gemma2": FURTHER["gemma2"] | HALF,
    "gemma3_text": HALF | {"head_dim": 12},
    "gemma4_text": FURTHER["gemma4_text"] | HALF,
    "gemma4_text with inputs of each layer": FURTHER["gemma4_text with inputs of each layer"]
    | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    "gemma4_unified_text": GEMMA4 | HALF,
    "gpt_oss": LOCAL | HALF | {"head_dim": 12},
    "granite_swa": FURTHER["granite_swa"] | HALF,
    "granitemoe_swa": MIXTURES["granitemoe_swa"] | HALF,
    "kolibri1": MIXTURES["kolibri1"] | HALF,
    "laguna": MIXTURES["laguna"] | HALF,
    "mellum": MIXTURES["mellum"] | HALF,
    "mimo_v2_flash": MIXTURES["mimo_v2_flash"] | HALF,
    "ministral": HALF | {"head_dim": 12},
    "olmo3": HALF,
    "qwen2": HALF | {"use_sliding_window": True},
    "qwen2_moe": MIXTURES["qwen2_moe"] | HALF | {"use_sliding_window": True},
    "qwen3_moe": MIXTURES["qwen3_moe"] | {"use_sliding_window": True},
    "qwen3": HALF | {"use_sliding_window": True, "head_dim": 12},
    "smollm3": HALF | {"use_sliding_window": True},
    "vaultgemma": FURTHER["vaultgemma"] | HALF,
}
