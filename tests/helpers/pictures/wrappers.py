"""Tiny random models with towers of every wrapper that is supported, and prompts with a picture."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

from tests.helpers.families import EXPERTS, GEMMA4, LINKED, SHAPE, prompt, randomise

IMAGE = 90
# What a decoder does layer by layer is tried without a wrapper: here two layers are enough, one with a window.
_LAYERS: dict[str, Any] = {"num_hidden_layers": 2}
_WINDOW: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
# Pictures of 8 x 8 pixels, in patches of 4 x 4; of Mistral 3, which merges four patches, of 16 x 16.
_EYE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_CLIP, _SIGLIP = {"model_type": "clip_vision_model", **_EYE}, {"model_type": "siglip_vision_model", **_EYE}
_QWEN_EYE: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "patch_size": 4, "intermediate_size": 32,
}  # fmt: skip
_DEEP = _QWEN_EYE | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_TURNED: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
_COHERE: dict[str, Any] = {"model_type": "cohere2", "logit_scale": 0.3, **_WINDOW}
_GEMMA: dict[str, Any] = {"head_dim": 12, "final_logit_softcapping": 3.0, **_WINDOW}
_ONE_TILE: dict[str, Any] = {"image_grid_pinpoints": [[8, 8]]}
_INDEX, _TOKEN = {"image_token_index": IMAGE}, {"image_token_id": IMAGE}
_TOKENS = _TOKEN | {"video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
# By model type: the decoder of text, the tower, and what else the configuration says.
TINY: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "aya_vision": (_COHERE, _SIGLIP, _INDEX),
    "cohere2_vision": (_COHERE, _SIGLIP, _TOKEN | {"alignment_intermediate_size": 32}),
    "gemma3": (_GEMMA, _SIGLIP, _INDEX | {"mm_tokens_per_image": 4}),
    "gemma4": (
        LINKED | {"layer_types": 2 * _WINDOW["layer_types"], "sliding_window": 16, "num_hidden_layers": 4},
        _EYE | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 16},
        _TOKEN | {"video_token_id": 91, "audio_token_id": 92},
    ),
    "gemma4_unified": (
        GEMMA4 | _WINDOW | {"use_bidirectional_attention": "vision"},
        {"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 48, "mm_posemb_size": 16, "output_proj_dims": 48},
        _TOKEN | {"video_token_id": 91, "audio_token_id": 92},
    ),
    "idefics3": ({"model_type": "llama"}, _EYE, _TOKEN),
    "internvl": ({"model_type": "qwen2"}, _EYE | {"image_size": [8, 8], "patch_size": [4, 4]}, _TOKEN),
    "llava": ({"model_type": "llama"}, _CLIP, _INDEX),
    "llava_next": ({"model_type": "mistral", "sliding_window": 16}, _CLIP, _INDEX | _ONE_TILE),
    "llava_onevision": ({"model_type": "qwen2"}, _SIGLIP, _INDEX | _ONE_TILE | {"video_token_index": 91}),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "head_dim": 8, **_EYE, "image_size": 16},
        _INDEX,
    ),
    "qwen2_vl": (
        _TURNED | _WINDOW | {"use_sliding_window": True},
        _QWEN_EYE | {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2},
        _TOKENS,
    ),
    "qwen2_5_vl": (_TURNED, _QWEN_EYE | {"fullatt_block_indexes": [1], "window_size": 16}, _TOKENS),
    "qwen3_vl": (_TURNED | {"head_dim": 12}, _DEEP, _TOKENS),
    "qwen3_vl_moe": (_TURNED | {"head_dim": 12} | EXPERTS | {"moe_intermediate_size": 32}, _DEEP, _TOKENS),
    "smolvlm": ({"model_type": "llama"}, _EYE, _TOKEN),
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
# Those that see a picture whole and in tiles, of which it has one here; each row of a tile ends in a token more.
TILED = ("llava_next", "llava_onevision")
# Tokens that a picture takes.
PICTURES = {
    "aya_vision": 1,
    "cohere2_vision": 1,
    "gemma3": 4,
    "gemma4": 4,
    "gemma4_unified": 4,
    "idefics3": 1,
    "internvl": 1,
    "llava": 4,
    "mistral3": 4,
    "smolvlm": 1,
}
PICTURES |= dict.fromkeys(QWEN, 4) | dict.fromkeys(TILED, 4 + 2 * 3)


def wrapper(name: str, dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    """A random model whose greedy output wanders; its decoder may be of another shape."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    text, vision, more = TINY[name]
    config = AutoConfig.for_model(name, text_config=SHAPE | _LAYERS | text | shape, vision_config=vision, **more)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size < 1e6, f"{name} has {size:,} parameters: a size was left at its default"
    randomise(model)
    for parameter in model.parameters():
        if not parameter.any():  # a projector that would let nothing through
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.pad_token_id = 0
    return model


def picture(name: str, dtype: torch.dtype, *, words: int = 6) -> dict[str, Any]:
    """What a processor makes of four words, a picture, and so many words more."""
    text, numbers = prompt(10), torch.Generator().manual_seed(5)
    ids = torch.cat([text[:, :4], torch.full((1, PICTURES[name]), IMAGE), text[:, 4 : 4 + words]], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = (ids == IMAGE).long()
    if name in QWEN:
        pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=numbers).to(dtype)
        grid = torch.tensor([[1, 4, 4]])
        return given | {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if name.startswith("gemma4"):  # of one, four patches make a token
        side = 4 if name == "gemma4" else 2
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)[None]
        pixels = torch.rand(1, side * side, 3 * 4 * 4, generator=numbers).to(dtype)
        return given | {"pixel_values": pixels, "image_position_ids": places, "mm_token_type_ids": kinds}
    size = 16 if name == "mistral3" else 8
    pixels = torch.randn(1, 3, size, size, generator=numbers).to(dtype)
    if name in TILED:
        pixels = torch.stack([pixels, pixels.flip(-1)], 1)
    given["pixel_values"] = pixels[None] if name in ("idefics3", "smolvlm") else pixels
    if name == "gemma3":
        given["token_type_ids"] = kinds
    return given | ({"image_sizes": torch.tensor([[size, size]])} if name in ("mistral3", *TILED) else {})
