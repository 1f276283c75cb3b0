"""`Plan`: how many steps a fit has, which text each sees, and its learning rate.

All of it follows from the settings, so checkpoints need not store it, and a continued run sees what an
uninterrupted one would. Knows no tensors of a model and no heads.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from train.settings.fit_config import FitConfig


@dataclass(frozen=True, slots=True)
class StepText:
    """What one process sees in one step.

    Attributes:
        batches: sequence indices of each micro-batch.
        num_positions: response positions of the whole step, over all micro-batches of all processes.
    """

    batches: list[list[int]]
    num_positions: int


class Plan:
    """Steps and epochs of a fit.

    Args:
        config: a validated recipe.
        lengths: response positions of each sequence of the fit split.
        rank, world_size: this process and how many there are.
    """

    def __init__(self, config: FitConfig, lengths: Sequence[int], *, rank: int = 0, world_size: int = 1) -> None:
        self.config = config
        self.lengths = list(lengths)
        self.rank = rank
        self.batch = config.per_device_train_batch_size * world_size  # sequences of a micro-batch, all processes
        self.per_step = self.batch * config.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(self.lengths) / self.per_step)
        epochs = math.ceil(self.steps_per_epoch * config.num_train_epochs)
        self.total = config.max_steps if config.max_steps > 0 else epochs
        self.num_batches = self.total * config.gradient_accumulation_steps * world_size

    def text(self, step: int) -> Iterator[StepText]:
        """What this process sees in each step from `step` (0 the first) to the last."""
        size = self.config.per_device_train_batch_size
        order: list[int] = []
        for index in range(step, self.total):
            epoch, within = divmod(index, self.steps_per_epoch)
            if not order or within == 0:
                order = self._order(epoch)
            whole = order[within * self.per_step : (within + 1) * self.per_step]
            starts = range(self.rank * size, self.per_step, self.batch)
            batches = [whole[start : start + size] for start in starts]
            yield StepText(batches, sum(self.lengths[sequence] for sequence in whole))

    def _order(self, epoch: int) -> list[int]:
        """Every sequence once, by seed and epoch alone; the first ones again to fill the last step."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        needed = self.steps_per_epoch * self.per_step
        return (order * math.ceil(needed / len(order)))[:needed]

    def learning_rate(self, step: int) -> float:
        """Of step `step`, 0 the first: a linear warm-up, then half a cosine to zero."""
        warmup = math.ceil(self.config.warmup_ratio * self.total)
        if step < warmup:
            return self.config.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.total - warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def is_evaluated(self, step: int) -> bool:
        """Whether the heads are evaluated once `step` steps are done: every `eval_steps` or epoch, and at the end."""
        return step % (self.config.eval_steps or self.steps_per_epoch) == 0 or step == self.total
