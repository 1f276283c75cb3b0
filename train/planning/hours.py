"""Hours of a corpus and of a fit: operations over throughput, and bytes that memory moves over its bandwidth.

A device does the one after the other here. Not counted: what is read from disk or gathered from other devices, the
time in which Python prepares what a device does, and that heads in float32 are slower than the base in bfloat16.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from runtime.decoding.families import numbers_per_token
from runtime.drafting.attention_head import FIT_DRAFTS
from runtime.drafting.heads import ExitHeads
from runtime.errors import ConfigError
from train.fitting.flops import FitFlops
from train.settings.fit_config import FitConfig

# Bytes that memory moves for one logit. The base's are written in 2 bytes, read, copied to 4, and read: by the choice
# of a token, or by top-k and the sum of exponentials. Those of heads pass ten times in 4 bytes, forward and backward.
GENERATED_LOGIT, TEACHER_LOGIT, HEAD_LOGIT = 12, 16, 40
# And for a parameter that is learnt, in a step: its gradient is written, read for two norms and clipped; it and both
# moments are read and written, and the gradient read.
LEARNT_PARAMETER = 4 + 8 + 8 + 24 + 4


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

    def seconds(self, operations: float, moved: float) -> float:
        """Of one device, for so many operations and so many bytes."""
        return (operations / (self.tflops * 1e12) + moved / (self.bandwidth * 1e9)) / self.utilisation

    @classmethod
    def parse(cls, text: str, **figures: float) -> "Devices":
        """Parse text such as `8x80`, eight devices of 80 GiB; raises ConfigError for other text."""
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text.strip())
        if match is None or int(match[1]) < 1 or float(match[2]) <= 0:
            raise ConfigError(f"gpus {text!r}: expected NUMBERxGIB, such as 8x80")
        return cls(int(match[1]), float(match[2]), **figures)


@dataclass(frozen=True, slots=True)
class Text:
    """`rows` prompts with their answers, each of `length` tokens, `responses` of them in the answer."""

    rows: int
    length: int
    responses: int

    @property
    def positions(self) -> int:
        """Answer tokens of all."""
        return self.rows * self.responses

    def forward(self, work: FitFlops) -> int:
        """Operations of the base's forward on all."""
        pairs = self.rows * self.length * (self.length + 1) // 2
        return work.base(self.rows * self.length, self.positions, pairs)


def settled_bytes(model: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token, in all layers."""
    return numbers_per_token(model) * itemsize


def corpus_seconds(
    config: FitConfig, model: Any, work: FitFlops, devices: Devices, text: Text, *, sharded: bool
) -> float:
    """Seconds of answering all prompts.

    Each step of a batch reads all weights once, the keys and values of every row as far as it has come, and moves its
    logits. Without sharding every device has batches of its own; with it each has its part of all of them.
    """
    itemsize, groups = getattr(torch, config.dtype).itemsize, 1 if sharded else devices.number
    weights = sum(parameter.numel() for parameter in model.parameters()) * itemsize
    mean = text.length - text.responses + (text.responses + 1) / 2
    row = mean * settled_bytes(model, itemsize) + GENERATED_LOGIT * model.config.get_text_config().vocab_size
    steps = text.positions / config.generation_batch_size / groups
    moved = steps * (weights + config.generation_batch_size * row) * groups / devices.number
    return devices.seconds(text.forward(work) / devices.number, moved)


def fit_seconds(
    config: FitConfig, model: Any, heads: ExitHeads, work: FitFlops, devices: Devices, text: Text
) -> float:
    """Seconds of all steps of a fit, and of the base's forwards: once with cached features, else in every epoch."""
    itemsize, shape = getattr(torch, config.dtype).itemsize, model.config.get_text_config()
    micro = config.per_device_train_batch_size * devices.number
    per_step = micro * config.gradient_accumulation_steps
    epochs = config.max_steps * per_step / text.rows if config.max_steps > 0 else config.num_train_epochs
    forwards = 1.0 if config.features == "cache" else epochs
    weights = sum(parameter.numel() for parameter in model.parameters()) * itemsize
    choices = text.positions * shape.vocab_size * TEACHER_LOGIT / devices.number
    base = devices.seconds(text.forward(work) / devices.number, text.rows / micro * weights + choices)
    drafts = len(heads.exit_layers) * (FIT_DRAFTS if heads.one.attends else 1)
    logits = text.positions * drafts * (config.draft_vocab_size or shape.vocab_size) * HEAD_LOGIT / devices.number
    learnt = sum(parameter.numel() for parameter in heads.parameters()) * LEARNT_PARAMETER
    learning = devices.seconds(work.heads(text.positions) / devices.number, logits + text.rows / per_step * learnt)
    return forwards * base + epochs * learning
