"""`specbound plan`: memory, disk and hours of a fit, from shapes alone. Knows no device and runs nothing.

Parameters are counted on models without memory, so they are exact. Memory adds up the tensors of the largest
moment of a step; hours divide operations and bytes by what the devices are said to do.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from runtime.drafting.heads import ExitHeads
from runtime.errors import ConfigError
from train.features.extractor import CHUNK
from train.fitting.flops import FitFlops
from train.settings.fit_config import FitConfig, parse_config, validate, validate_against_model

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Devices:
    """`number` devices of `memory_gib`, each of `tflops` (bfloat16, peak) and `bandwidth` GB/s.

    `utilisation` is the share of the peak that a fit reaches, and of the bandwidth that generation does.
    """

    number: int
    memory_gib: float
    tflops: float = 312.0
    bandwidth: float = 2000.0
    utilisation: float = 0.35

    @classmethod
    def parse(cls, text: str, **figures: float) -> "Devices":
        """`8x80` is eight of 80 GiB; raises ConfigError for anything else."""
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text.strip())
        if match is None or int(match[1]) < 1 or float(match[2]) <= 0:
            raise ConfigError(f"gpus {text!r}: expected NUMBERxGIB, such as 8x80")
        return cls(int(match[1]), float(match[2]), **figures)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a fit takes; memory is of one device, in bytes.

    Attributes:
        base_parameters, head_parameters: exact.
        sharded: whether the base's decoder layers are spread over the devices.
        memory: what for -> bytes, while fitting.
        generation: bytes while the base answers prompts; 0 where it is spread, for then another engine had better.
        cache, checkpoint: bytes of disk, of `features: cache` and of one checkpoint.
        tokens: response tokens of the corpus.
        corpus_hours, fit_hours: under the devices' figures.
        times_forward: operations of the fit over those of the base's forward on the same text.
    """

    base_parameters: int
    head_parameters: int
    sharded: bool
    memory: dict[str, float]
    generation: float
    cache: float
    checkpoint: float
    tokens: int
    corpus_hours: float
    fit_hours: float
    times_forward: float

    @property
    def total_memory(self) -> float:
        """Bytes on one device."""
        return sum(self.memory.values())


def empty_heads(config: FitConfig, model: Any) -> ExitHeads:
    """The heads of a recipe on a base, with shapes and no memory."""
    with torch.device("meta"):
        return ExitHeads(
            config.head,
            config.exit_layers,
            hidden_size=model.config.hidden_size,
            draft_vocab_size=config.draft_vocab_size or model.config.vocab_size,
            rank=config.head_rank,
        )


def estimate(config: FitConfig, model: Any, devices: Devices, *, num_prompts: int, prompt_tokens: int) -> Estimate:
    """Plan the fit of a recipe.

    Args:
        model: the base on `meta`, see `empty_model`.
        num_prompts: of the corpus. Answers are taken to be of `max_new_tokens`, so that hours are at most these.
        prompt_tokens: mean length of a prompt.

    Raises:
        ConfigError: the base does not fit on the devices even when spread over them.
    """
    heads = empty_heads(config, model)
    itemsize = getattr(torch, config.dtype).itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters())
    learned = sum(parameter.numel() for parameter in heads.parameters())
    length = min(config.max_length, prompt_tokens + config.max_new_tokens)
    responses = min(config.max_new_tokens, length)
    memory = step_memory(config, model, heads, length=length, responses=responses)
    base = {"base": parameters * itemsize} | _sharing(learned, devices.number)
    room = devices.memory_gib * GIB
    sharded = sum(base.values()) + sum(memory.values()) > 0.95 * room
    if sharded:
        base = {"base": _sharded_base(model, devices.number) * itemsize}
        base |= _sharing(learned, devices.number)
    flops = FitFlops.of(model, heads)
    tokens = num_prompts * responses
    forward = flops.base(num_prompts * length, tokens, num_prompts * length * (length + 1) // 2)
    fitted = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    fitted *= devices.number * responses
    epochs = fitted / tokens if config.max_steps > 0 else config.num_train_epochs
    forwards = 1 if config.features == "cache" else epochs
    rate = devices.number * devices.tflops * 1e12 * devices.utilisation
    plan = Estimate(
        base_parameters=parameters,
        head_parameters=learned,
        sharded=sharded,
        memory=base | memory,
        generation=0.0 if sharded else parameters * itemsize + _generation_bytes(config, model, prompt_tokens),
        cache=tokens * position_bytes(config, model) if config.features == "cache" else 0.0,
        checkpoint=12.0 * learned,
        tokens=tokens,
        corpus_hours=_generation_seconds(config, parameters * itemsize, tokens, forward, devices, sharded) / 3600,
        fit_hours=(forwards * forward + epochs * flops.heads(tokens)) / rate / 3600,
        times_forward=(forward + flops.heads(tokens)) / forward,
    )
    if plan.generation > room:
        raise ConfigError(
            f"answering {config.generation_batch_size} prompts at a time needs {plan.generation / GIB:.1f} of"
            f" {devices.memory_gib:g} GiB: lower generation_batch_size"
        )
    if plan.total_memory > room:
        raise ConfigError(
            f"the fit needs {plan.total_memory / GIB:.1f} of {devices.memory_gib:g} GiB on each device with its base"
            f" spread over {devices.number}: use more devices, a smaller batch, max_length or draft vocabulary"
        )
    return plan


def step_memory(config: FitConfig, model: Any, heads: ExitHeads, *, length: int, responses: int) -> dict[str, float]:
    """Bytes of the tensors of one step of one process: what for -> bytes.

    Args:
        length: tokens of the longest sequence, prompt and response.
        responses: response positions of a sequence.
    """
    shape, batch = model.config, config.per_device_train_batch_size
    itemsize = getattr(torch, config.dtype).itemsize
    draft = config.draft_vocab_size or shape.vocab_size
    exits, tokens, positions = len(heads.exit_layers), batch * length, batch * responses
    kept = (exits + 2) * positions * shape.hidden_size * itemsize
    # In a layer: residual, normed and attended states, and the three of a gated MLP.
    layer = tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size) * itemsize
    choice = min(CHUNK, positions) * shape.vocab_size * 8
    # All exits' logits and log-probabilities; going backward the former are gone, and three of one exit's come.
    logits = max(8 * exits, 4 * exits + 12) * positions * draft
    inner = 4 * positions * sum(head.kept_numbers for head in heads)
    return {
        "draft rows": draft * shape.hidden_size * itemsize if heads.one.borrows_rows else 0.0,
        "features": float(kept + positions * 12 * config.teacher_top_k),
        "largest of layer, choice and logits": float(max(layer, choice, logits + inner)),
    }


def position_bytes(config: FitConfig, model: Any) -> float:
    """Bytes of disk of one response position of cached features."""
    itemsize = getattr(torch, config.dtype).itemsize
    states = (len(config.exit_layers) + 2) * model.config.hidden_size * itemsize
    return states + 12 * min(config.teacher_top_k, model.config.vocab_size) + 8


def _sharing(learned: int, number: int) -> dict[str, float]:
    """Heads in float32, with gradients and the two moments of AdamW; DDP has a copy of the gradients in buckets."""
    buckets = 4.0 * learned if number > 1 else 0.0
    return {"heads and optimizer": 16.0 * learned + buckets}


def _sharded_base(model: Any, number: int) -> float:
    """Parameters on one device: its part of the decoder layers, two of them gathered, and all that is no layer."""
    total = sum(parameter.numel() for parameter in model.parameters())
    outside = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        outside += model.get_output_embeddings().weight.numel()
    layers = total - outside
    return outside + layers / number + 2 * layers / model.config.num_hidden_layers


def _generation_bytes(config: FitConfig, model: Any, prompt_tokens: int) -> float:
    """Keys, values and logits of a batch of answers."""
    shape, itemsize = model.config, getattr(torch, config.dtype).itemsize
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    kept = 2 * shape.num_hidden_layers * (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)
    length = prompt_tokens + config.max_new_tokens
    return config.generation_batch_size * (length * kept * width * itemsize + 3 * 4 * shape.vocab_size)


def _generation_seconds(
    config: FitConfig, base_bytes: float, tokens: int, forward: int, devices: Devices, sharded: bool
) -> float:
    """Every step of generation reads the weights once for a batch; spread weights are read by all devices at once."""
    groups = 1 if sharded else devices.number
    steps = tokens / config.generation_batch_size / groups
    reading = steps * base_bytes / ((devices.number if sharded else 1) * devices.bandwidth * 1e9 * devices.utilisation)
    computing = forward / (devices.number * devices.tflops * 1e12 * devices.utilisation)
    return reading + computing


def recipe_for(name: str, model: Any = None) -> FitConfig:
    """The recipe in a file, or default settings for a base; with the base's depth the exits are set to it.

    Raises:
        ConfigError: the file is no recipe, or its exits are not the base's.
    """
    if name.endswith((".yaml", ".yml")):
        config = parse_config(["--config", name])
    else:
        layers = 32 if model is None else model.config.num_hidden_layers
        exits = sorted({max(1, layers // 16), max(1, layers // 8), max(1, layers // 4)})
        size = 8192 if model is None else min(8192, model.config.vocab_size)
        settings: dict[str, Any] = {"prompts": ["-"], "output_dir": "-", "draft_vocab_size": size}
        config = FitConfig(model_name_or_path=name, exit_layers=exits, **settings)
    validate(config)
    if model is not None:
        shape = model.config
        validate_against_model(config, num_hidden_layers=shape.num_hidden_layers, vocab_size=shape.vocab_size)
    return config
