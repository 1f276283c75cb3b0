"""Shapes of bases without their weights: from a folder, from the Hub, or from the table `KNOWN`.

The table repeats figures of the models' own config files. With it a fit of a gated or large base can be planned
without an account or a download.
"""

from typing import Any

import torch
from transformers import AutoConfig

from runtime.base import auto_class, from_pretrained
from runtime.decoding.families import check_config
from runtime.errors import AdapterError, ConfigError
from runtime.exact.execution import mixtures
from train.features.weights import experts_per_token

_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
KNOWN: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3 | {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3 | {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "google/gemma-3-270m": {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        "max_position_embeddings": 32768, "sliding_window": 512, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "Qwen/Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "codellama/CodeLlama-13b-Instruct-hf": {
        "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32016, "max_position_embeddings": 16384,
    },
}  # fmt: skip


def empty_model(name: str, *, revision: str | None = None) -> Any:
    """Make a model on the `meta` device from its config, with shapes but no memory.

    Args:
        name: an id in `KNOWN`, a folder or a file with a config, or a Hub id.

    Raises:
        ConfigError: there is no such config.
        UnsupportedModel: SpecBound does not support this kind of model.
    """
    if name in KNOWN:
        figures = dict(KNOWN[name])
        config = AutoConfig.for_model(figures.pop("model_type"), **figures)
    else:
        try:
            config = from_pretrained(AutoConfig, str(name), {"revision": revision})
        except AdapterError as error:
            raise ConfigError(
                f"no config of {name!r} could be loaded ({error}); these need none: {', '.join(KNOWN)}"
            ) from error
    check_config(config)
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def inner_size(model: Any) -> int:
    """Size of the inner states of a layer's MLP; GPT-2's config has another name for it, or leaves it to be known.

    Of a mixture, that of all experts of a token, where it is more than that of a layer without experts.
    """
    shape = model.config.get_text_config()
    names = ("intermediate_size", "n_inner", "moe_intermediate_size")
    dense = next((size for name in names if (size := getattr(shape, name, None))), 4 * int(shape.hidden_size))
    if not mixtures(model):
        return int(dense)
    expert = getattr(shape, "moe_intermediate_size", None) or dense
    return max(dense, experts_per_token(shape) * (max(expert) if isinstance(expert, list) else expert))
