"""Configurations of tiny models, of every family that is supported: what they need besides `SHAPE`."""

from typing import Any

from transformers import (
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCABULARY = 96
LAYERS = 4
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SCALED: dict[str, Any] = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=12),
    "smollm3": SmolLM3Config(**SHAPE),
    "olmo2": Olmo2Config(**SHAPE),
    "granite": GraniteConfig(**SHAPE, **SCALED),
    "phi3": Phi3Config(**SHAPE),
    "gemma": GemmaConfig(**SHAPE, head_dim=12),
    "gpt_neox": GPTNeoXConfig(**{key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}),
    "gpt2": GPT2Config(
        n_embd=48, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, initializer_range=0.25, eos_token_id=None,
        pad_token_id=0, bos_token_id=1,
    ),
}  # fmt: skip
# Without a window in any layer; the window that is named beside is nobody's.
FULL: dict[str, Any] = {"layer_types": ["full_attention"] * LAYERS, "sliding_window": 8}
# Two of four experts a token, in the words of each kind of configuration.
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
# With attention in every layer: sizes of the layers that it might have instead are checked all the same.
GRANITE_4: dict[str, Any] = SCALED | {
    "shared_intermediate_size": 96,
    "position_embedding_type": "rope",
    "mamba_n_heads": 8,
    "layer_types": FULL["layer_types"],
}
# Layers, heads and sizes in the words of GPT-2's relatives.
_WORDS: dict[str, Any] = {"n_embd": 48, "n_layer": LAYERS, "n_head": 4}
# Keys and values made of what is cached of both; values of another size than keys.
_LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,  # each row by row: more would take long
}
_GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1}
# Heads that differ from layer to layer in size and number.
GEMMA4: dict[str, Any] = FULL | {
    "head_dim": 12,
    "final_logit_softcapping": 3.0,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
}
LINKED = GEMMA4 | {
    "layer_types": ["full_attention"] * LAYERS,
    "hidden_size_per_layer_input": 32,  # as with the sigmoid below, gelu has other bits in what is left over
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
# Families whose layers run as they are, with what their configurations need besides `SHAPE`.
FURTHER: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "codegen": _WORDS | {"rotary_dim": 8},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, **FULL},
    "cwm": {"head_dim": 12, **FULL},
    "diffllama": {},
    "ernie4_5": {"head_dim": 12},
    "exaone4": FULL | {"sliding_window": None},
    "falcon": {},
    "falcon with keys of groups": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon one after the other": {"parallel_attn": False, "bias": True, "multi_query": False},
    "gemma2": {"head_dim": 12, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, **FULL},
    "gemma3_text": FULL | {"head_dim": 12, "final_logit_softcapping": 3.0},
    "gemma4_text": GEMMA4 | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
    # Layers that share keys come after one of each kind that has its own.
    "gemma4_text with inputs of each layer": LINKED,
    "gemma4_unified_text": GEMMA4,
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "gpt_bigcode": _WORDS,
    "gpt_bigcode with all keys": _WORDS | {"multi_query": False},
    "gpt_neo": {
        "num_heads": 4,
        "num_layers": LAYERS,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 16,
    },
    "gpt_neox_japanese": {},
    "gptj": _WORDS | {"rotary_dim": 8},
    "granite_swa": SCALED | FULL | {"layer_rope_theta": [1e4, 0, 5e5, 1e4]},
    "granitemoehybrid": GRANITE_4 | {"num_local_experts": 0},
    "helium": {"head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 12},
    "hyperclovax": SCALED | {"logits_scaling": 0.3},
    "internlm3": {"head_dim": 12},
    "iquestcoder": {"head_dim": 12},
    "jais2": {},
    "minicpm3": _LATENT | {"dim_model_base": 16},
    "ministral": {"head_dim": 12, **FULL},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
        "head_dim": 12,
    },
    "nanochat": {"final_logit_softcapping": 3.0},
    "nemotron": {"hidden_act": "relu2"},
    "olmo": {"clip_qkv": 2.0},
    "olmo3": FULL,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "persimmon": {"hidden_size": 64},
    "phi": {"hidden_size": 64, "qk_layernorm": True},
    "seed_oss": {"head_dim": 12},
    "stablelm": {"hidden_size": 64, "use_qkv_bias": True},
    "starcoder2": {"sliding_window": None},
    "vaultgemma": FULL | {"head_dim": 12, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "xglm": {"d_model": 48, "ffn_dim": 96, "num_layers": LAYERS, "attention_heads": 4},
    "youtu": _LATENT,
}
# Mixtures of experts: two of four experts a token, and what else their configurations name.
_SMALL: dict[str, Any] = {"head_dim": 12, "moe_intermediate_size": 32}
_DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1)}
MIXTURES: dict[str, dict[str, Any]] = {
    # torch's sigmoid, of the gate of all heads, has other bits in what is left over of 32 numbers
    "afmoe": EXPERTS | FULL | _SMALL | {"head_dim": 16, "mup_enabled": True},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": ROUTED | _LATENT | _GROUPS,
    "cohere2_moe": EXPERTS | FULL | {"head_dim": 12, "logit_scale": 0.3, "num_shared_experts": 1},
    "dbrx": {
        "d_model": 48,
        "n_heads": 4,
        "n_layers": LAYERS,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 48, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": ROUTED | _LATENT,
    "deepseek_v2 without latent queries": ROUTED | _LATENT | {"q_lora_rank": None},
    "deepseek_v3": ROUTED | _LATENT | _GROUPS,
    "dots1": FULL | ROUTED | {"norm_topk_prob": True},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "exaone_moe": EXPERTS | FULL | _SMALL,
    "flex_olmo": EXPERTS,
    "flint": EXPERTS | FULL | _SMALL | {"shared_expert_intermediate_size": 32},
    "gemma4_text with experts": GEMMA4
    | {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    | {"moe_intermediate_size": 32},
    "glm4_moe": ROUTED | {"head_dim": 12},
    "glm4_moe_lite": ROUTED | _LATENT | _GROUPS,
    "gpt_oss": LOCAL | FULL | {"head_dim": 12},
    "granitemoe": LOCAL | SCALED,
    "granitemoe_swa": LOCAL | SCALED | FULL | {"layer_rope_theta": [1e4, 0, 5e5, 1e4]},
    "granitemoehybrid with experts": GRANITE_4 | LOCAL,
    "granitemoeshared": LOCAL | SCALED | {"shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 12},
    "hy_v3": EXPERTS | _SMALL | _DENSE_FIRST,
    "jetmoe": LOCAL | {"kv_channels": 12},
    "kolibri1": EXPERTS | FULL | _SMALL | {"shared_expert_intermediate_size": 32},
    "laguna": EXPERTS
    | FULL
    | _SMALL
    | {"head_dim": 16, "shared_expert_intermediate_size": 32, "gating": "per-element"}
    | {"num_attention_heads_per_layer": [4, 2, 4, 4]},
    "mellum": EXPERTS | FULL | _SMALL,
    "mimo_v2_flash": ROUTED | FULL | {"head_dim": 12, "v_head_dim": 8},
    "minimax_m2": LOCAL | {"head_dim": 12},
    "mixtral": LOCAL,
    "olmoe": EXPERTS,
    "phimoe": LOCAL,
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 32, "head_dim": 12, "mlp_only_layers": [1]},
    "solar_open": ROUTED | {"head_dim": 12},
}
# Rotary positions stretched for texts of more than 16 tokens.
_YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
TURNED: dict[str, dict[str, Any]] = {
    "llama with yarn": {"rope_parameters": _YARN},
    "olmo3 with yarn": FULL | {"rope_parameters": {"full_attention": _YARN}},
}
# Decoders that have no model of their own: `test_wrappers.py` tries them where they are.
INSIDE_ALONE = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")
# Sizes that our own kernels take.
NATIVE_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
