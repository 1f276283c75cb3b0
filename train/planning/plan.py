"""Estimate memory, disk and hours of a fit from shapes alone, without running anything.

Parameters are counted on `meta` models, so they are exact. Memory is the sum of the tensors at the peak of a step.
Hours are operations and bytes, divided by the throughput and bandwidth given for the devices.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from runtime.drafting.attention_head import FIT_DRAFTS
from runtime.drafting.heads import ExitHeads
from runtime.errors import ConfigError
from train.features.extractor import CHUNK
from train.features.prompts import PROMPT_TOKENS
from train.features.weights import active_parameters
from train.fitting.flops import FitFlops
from train.planning.shapes import inner_size
from train.settings.fit_config import FitConfig, parse_config, validate, validate_against_model

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Devices:
    """`number` equal devices, each with `memory_gib`, `tflops` (bfloat16, peak) and `bandwidth` in GB/s.

    `utilisation` is the share of the peak TFLOP/s and of the bandwidth that is reached in practice.
    """

    number: int
    memory_gib: float
    tflops: float = 312.0
    bandwidth: float = 2000.0
    utilisation: float = 0.35

    @classmethod
    def parse(cls, text: str, **figures: float) -> "Devices":
        """Parse text such as `8x80`, eight devices of 80 GiB; raises ConfigError for other text."""
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text.strip())
        if match is None or int(match[1]) < 1 or float(match[2]) <= 0:
            raise ConfigError(f"gpus {text!r}: expected NUMBERxGIB, such as 8x80")
        return cls(int(match[1]), float(match[2]), **figures)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate of a fit. Memory is in bytes, on one device.

    Attributes:
        base_parameters, active_parameters, head_parameters: exact counts; active are those that a token runs through.
        sharded: whether the base's decoder layers are spread over the devices.
        memory: bytes needed while fitting, by purpose.
        generation: bytes needed while the base answers prompts; 0 if it is sharded, since another engine should.
        cache, checkpoint: bytes of disk for `features: cache` and for one checkpoint.
        tokens: response tokens in the corpus.
        corpus_hours, fit_hours: hours on these devices.
        times_forward: operations of one epoch, divided by those of the base's forward on the same text.
    """

    base_parameters: int
    active_parameters: int
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
        """Bytes needed on one device while fitting."""
        return sum(self.memory.values())


def empty_heads(config: FitConfig, model: Any) -> ExitHeads:
    """Make the heads of a recipe on the `meta` device, with shapes but no memory."""
    shape = model.config.get_text_config()
    with torch.device("meta"):
        return ExitHeads(
            config.head,
            config.exit_layers,
            hidden_size=shape.hidden_size,
            draft_vocab_size=config.draft_vocab_size or shape.vocab_size,
            rank=config.head_rank,
        )


def estimate(config: FitConfig, model: Any, devices: Devices, *, num_prompts: int, prompt_tokens: int) -> Estimate:
    """Estimate the fit of a recipe.

    Args:
        model: the base on `meta`, see `empty_model`.
        num_prompts: prompts in the corpus. Every answer counts as `max_new_tokens` long, so hours are upper bounds.
        prompt_tokens: mean length of a prompt.

    Raises:
        ConfigError: the fit or the generation needs more memory than a device has.
    """
    heads = empty_heads(config, model)
    itemsize = getattr(torch, config.dtype).itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters())
    learned = sum(parameter.numel() for parameter in heads.parameters())
    length = min(config.longest, prompt_tokens + config.max_new_tokens)
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
        active_parameters=active_parameters(model),
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
    """Estimate the bytes of the tensors of one step on one process, by purpose.

    Args:
        length: tokens of the longest sequence, prompt and response.
        responses: response positions in a sequence.
    """
    shape, batch = model.config.get_text_config(), config.per_device_train_batch_size
    itemsize = getattr(torch, config.dtype).itemsize
    draft = config.draft_vocab_size or shape.vocab_size
    exits, tokens, positions = len(heads.exit_layers), batch * length, batch * responses
    prompts = batch * min(PROMPT_TOKENS, length - responses) if heads.one.attends else 0
    kept = (exits + 2) * (positions + prompts) * shape.hidden_size * itemsize
    # In a decoder layer: residual, normed and attended states, and three tensors of a gated MLP.
    layer = tokens * (4 * shape.hidden_size + 3 * inner_size(model)) * itemsize
    choice = min(CHUNK, positions) * shape.vocab_size * 8
    # Forward: logits and log-probabilities of all exits. Backward: only the latter, and three tensors of one exit.
    drafts = exits * (FIT_DRAFTS if heads.one.attends else 1)
    logits = max(8 * drafts, 4 * drafts + 12) * positions * draft
    inner = 4 * positions * sum(head.kept_numbers for head in heads)
    return {
        "draft rows": draft * shape.hidden_size * itemsize if heads.one.borrows_rows else 0.0,
        "features": float(kept + positions * 12 * config.teacher_top_k),
        "largest of layer, choice and logits": float(max(layer, choice, logits + inner)),
    }


def position_bytes(config: FitConfig, model: Any) -> float:
    """Estimate the bytes on disk of one response position of cached features."""
    itemsize = getattr(torch, config.dtype).itemsize
    shape = model.config.get_text_config()
    states = (len(config.exit_layers) + 2) * shape.hidden_size * itemsize
    return states + 12 * min(config.teacher_top_k, shape.vocab_size) + 8


def _sharing(learned: int, number: int) -> dict[str, float]:
    """Estimate the bytes of float32 heads, gradients and AdamW moments, plus DDP's copy of the gradients."""
    buckets = 4.0 * learned if number > 1 else 0.0
    return {"heads and optimizer": 16.0 * learned + buckets}


def _sharded_base(model: Any, number: int) -> float:
    """Count parameters on one device: its shard of the layers, two gathered layers, and both embeddings."""
    total = sum(parameter.numel() for parameter in model.parameters())
    outside = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        outside += model.get_output_embeddings().weight.numel()
    layers = total - outside
    return outside + layers / number + 2 * layers / model.config.get_text_config().num_hidden_layers


def _generation_bytes(config: FitConfig, model: Any, prompt_tokens: int) -> float:
    """Estimate the bytes of keys, values and logits of a batch of answers."""
    shape, itemsize = model.config.get_text_config(), getattr(torch, config.dtype).itemsize
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    kept = 2 * shape.num_hidden_layers * (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)
    length = prompt_tokens + config.max_new_tokens
    return config.generation_batch_size * (length * kept * width * itemsize + 3 * 4 * shape.vocab_size)


def _generation_seconds(
    config: FitConfig, base_bytes: float, tokens: int, forward: int, devices: Devices, sharded: bool
) -> float:
    """Estimate the seconds of generation: each step reads all weights once per batch, and a forward is computed.

    Without sharding every device reads the whole weights; with it each device reads its part.
    """
    groups = 1 if sharded else devices.number
    steps = tokens / config.generation_batch_size / groups
    reading = steps * base_bytes / ((devices.number if sharded else 1) * devices.bandwidth * 1e9 * devices.utilisation)
    computing = forward / (devices.number * devices.tflops * 1e12 * devices.utilisation)
    return reading + computing


def recipe_for(name: str, model: Any = None) -> FitConfig:
    """Read a recipe from a file, or make default settings for a base.

    Args:
        model: the base, see `empty_model`; with it the default exits follow its depth, and all exits are checked.

    Raises:
        ConfigError: the file is not a recipe, or its settings do not suit the base.
    """
    if name.endswith((".yaml", ".yml")):
        config = parse_config(["--config", name])
    else:
        shape = None if model is None else model.config.get_text_config()
        layers = 32 if shape is None else shape.num_hidden_layers
        exits = sorted({max(1, layers // 16), max(1, layers // 8), max(1, layers // 4)})
        size = 8192 if shape is None else min(8192, shape.vocab_size)
        settings: dict[str, Any] = {"prompts": ["-"], "output_dir": "-", "draft_vocab_size": size}
        config = FitConfig(model_name_or_path=name, exit_layers=exits, **settings)
    validate(config)
    if model is not None:
        shape = model.config.get_text_config()
        validate_against_model(config, num_hidden_layers=shape.num_hidden_layers, vocab_size=shape.vocab_size)
    return config
