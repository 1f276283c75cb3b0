"""Estimate memory, disk and hours of a fit from shapes alone, without running anything.

Parameters are counted on `meta` models, so they are exact. Memory is the sum of the tensors at the peak of a step.
Hours: see `train.planning.hours`.
"""

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
from train.planning.hours import Devices, Text, corpus_seconds, fit_seconds, settled_bytes
from train.planning.shapes import inner_size
from train.settings.fit_config import FitConfig, parse_config, validate, validate_against_model

GIB = 2**30


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
    itemsize, vocab_size = getattr(torch, config.dtype).itemsize, model.config.get_text_config().vocab_size
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
    text = Text(num_prompts, length, responses)
    work = FitFlops.of(model, heads)
    generation = config.generation_batch_size * (length * settled_bytes(model, itemsize) + 12 * vocab_size)
    plan = Estimate(
        base_parameters=parameters,
        active_parameters=active_parameters(model),
        head_parameters=learned,
        sharded=sharded,
        memory=base | memory,
        generation=0.0 if sharded else parameters * itemsize + generation,
        cache=text.positions * position_bytes(config, model) if config.features == "cache" else 0.0,
        checkpoint=12.0 * learned,
        tokens=text.positions,
        corpus_hours=corpus_seconds(config, model, work, devices, text, sharded=sharded) / 3600,
        fit_hours=fit_seconds(config, model, heads, work, devices, text) / 3600,
        times_forward=1 + work.heads(text.positions) / text.forward(work),
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
