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
# Families whose layers run as they are, with what their configurations need besides `SHAPE`.
FURTHER: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, **FULL},
    "cwm": {"head_dim": 12, **FULL},
    "diffllama": {},
    "ernie4_5": {"head_dim": 12},
    "exaone4": FULL | {"sliding_window": None},
    "gemma2": {"head_dim": 12, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, **FULL},
    "gemma3_text": FULL | {"head_dim": 12, "final_logit_softcapping": 3.0},
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "granitemoehybrid": GRANITE_4 | {"num_local_experts": 0},
    "helium": {"head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 12},
    "hyperclovax": SCALED | {"logits_scaling": 0.3},
    "jais2": {},
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
    "nemotron": {"hidden_act": "relu2"},
    "olmo": {"clip_qkv": 2.0},
    "olmo3": FULL,
    "persimmon": {"hidden_size": 64},
    "phi": {"hidden_size": 64, "qk_layernorm": True},
    "seed_oss": {"head_dim": 12},
    "stablelm": {"hidden_size": 64, "use_qkv_bias": True},
    "starcoder2": {"sliding_window": None},
}
# Mixtures of experts: two of four experts a token, and what else their configurations name.
MIXTURES: dict[str, dict[str, Any]] = {
    "dots1": FULL | ROUTED | {"norm_topk_prob": True},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "flex_olmo": EXPERTS,
    "glm4_moe": ROUTED | {"head_dim": 12},
    "gpt_oss": LOCAL | FULL | {"head_dim": 12},
    "granitemoe": LOCAL | SCALED,
    "granitemoehybrid with experts": GRANITE_4 | LOCAL,
    "granitemoeshared": LOCAL | SCALED | {"shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 12},
    "minimax_m2": LOCAL | {"head_dim": 12},
    "mixtral": LOCAL,
    "olmoe": EXPERTS,
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
# Windows, in half of the layers where a family can have both.
HALF: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2)}
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "ministral3": FURTHER["ministral3"],
    "mixtral": LOCAL,
    "phi3": {},
    "starcoder2": {},
    "cohere2": HALF | {"logit_scale": 0.3},
    "cwm": HALF | {"head_dim": 12},
    "dots1": MIXTURES["dots1"] | HALF,
    "exaone4": HALF,
    "gemma2": FURTHER["gemma2"] | HALF,
    "gemma3_text": HALF | {"head_dim": 12},
    "gpt_oss": LOCAL | HALF | {"head_dim": 12},
    "ministral": HALF | {"head_dim": 12},
    "olmo3": HALF,
    "qwen2": HALF | {"use_sliding_window": True},
    "qwen2_moe": MIXTURES["qwen2_moe"] | HALF | {"use_sliding_window": True},
    "qwen3_moe": MIXTURES["qwen3_moe"] | {"use_sliding_window": True},
    "qwen3": HALF | {"use_sliding_window": True, "head_dim": 12},
    "smollm3": HALF | {"use_sliding_window": True},
}

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
