"""Models of several kinds of input: where the decoder of text is inside them.

Images, sound and the like go through a prompt's forward alone, which is stock's; text decodes through the decoder.
Which family that is, its own config says. Knows no family by name.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model around a decoder of text.

    Attributes:
        body: where the decoder is; what lies beside it only a prompt runs through.
        scaled: its logits are scaled and capped as its decoder's own would be; else they are those of the unembedding.
        masked: where tokens of a picture see each other, text without one gets a mask as well.
        blank: fields of the config: tokens that stand for other kinds of input, read as padding where text has them.
        prompt: what `generate` passes to the prompt's forward and no later one reads, besides `mm_encoder_outputs`.
    """

    body: str = "model.language_model"
    prompt: tuple[str, ...] = ("pixel_values", "image_sizes")
    scaled: bool = False
    masked: bool = False
    blank: tuple[str, ...] = ()


_IDEFICS = Wrapper("model.text_model", ("pixel_values", "pixel_attention_mask"))
_GEMMA4 = Wrapper(
    prompt=(
        *("pixel_values", "image_position_ids", "pixel_values_videos", "video_position_ids"),
        *("num_frames_per_video", "input_features", "input_features_mask", "mm_token_type_ids"),
    ),
    scaled=True,
    blank=("image_token_id", "video_token_id", "audio_token_id"),
)
_GRIDS = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "mm_token_type_ids")
WRAPPERS = {
    "aya_vision": Wrapper(),
    "cohere2_vision": Wrapper(),
    "gemma3": Wrapper(prompt=("pixel_values", "token_type_ids")),
    "gemma4": _GEMMA4,
    "gemma4_unified": replace(_GEMMA4, masked=True),
    "idefics3": _IDEFICS,
    "internvl": Wrapper(),
    "llava": Wrapper(),
    "llava_next": Wrapper(),
    "llava_onevision": Wrapper(
        prompt=("pixel_values", "image_sizes", "pixel_values_videos", "image_sizes_videos", "batch_num_images")
    ),
    "mistral3": Wrapper(),
    "qwen2_vl": Wrapper(prompt=_GRIDS),
    "qwen2_5_vl": Wrapper(prompt=(*_GRIDS, "second_per_grid_ts")),
    "qwen3_vl": Wrapper(prompt=_GRIDS),
    "qwen3_vl_moe": Wrapper(prompt=_GRIDS),
    "smolvlm": _IDEFICS,
}


def prompt_arguments(config: Any) -> set[str]:
    """What of a call's arguments the prompt's forward alone reads; of a model of text nothing."""
    wrapper = WRAPPERS.get(config.model_type)
    return set() if wrapper is None else {*wrapper.prompt, "mm_encoder_outputs"}


def blank_tokens(config: Any) -> list[int]:
    """Ids that a model reads as padding wherever text has them; of a model of text none."""
    wrapper = WRAPPERS.get(config.model_type)
    ids = () if wrapper is None else (getattr(config, field, None) for field in wrapper.blank)
    return [each for each in ids if each is not None]


def holder(model: Any) -> nn.Module | None:
    """The module that holds a wrapper's decoder, and towers beside it; None for a model of text."""
    wrapper = WRAPPERS.get(model.config.model_type)
    if wrapper is None:
        return None
    held: nn.Module | None = getattr(model, wrapper.body.partition(".")[0], None)
    return held


def towers(model: Any) -> set[nn.Module]:
    """What lies beside the decoder of text, and only a prompt runs through; of a model of text nothing."""
    held = holder(model)
    if held is None:
        return set()
    decoder = WRAPPERS[model.config.model_type].body.partition(".")[2]
    return {child for name, child in held.named_children() if name != decoder}


def text_modules(model: Any) -> list[tuple[str, nn.Module]]:
    """Names and modules that decoding may run through, in the model's order: all of it but its towers."""
    return list(model.named_modules(memo=towers(model)))
