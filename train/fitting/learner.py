"""`Learner`: one optimizer step of the heads at a time. Knows no steps before or after, no files and no figures."""

import logging
import math
from dataclasses import fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from runtime.drafting.attention_head import FIT_DRAFTS
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads, attends
from runtime.errors import DataError
from train.features.extractor import Features
from train.features.split import Split
from train.fitting.alarms import Alarms
from train.fitting.losses import Targets, distillation_loss
from train.fitting.schedule import StepText
from train.optimizer.muon import Muon
from train.settings.fit_config import FitConfig

logger = logging.getLogger(__name__)

STEP_DECAY = 0.7  # weight of a draft of a round against the one before, for heads that learn several at each position


class Learner:
    """One optimizer step at a time; a batch whose loss is not finite is left out and counted.

    Args:
        heads: with what accelerate made of the exit heads.
        of: batches of the whole fit, of all processes.

    Attributes:
        skipped: batches left out so far, by all processes, because their loss or gradient was not finite.
        norm: of the last step's gradient before clipping; None where it is not known.
    """

    def __init__(
        self,
        config: FitConfig,
        accelerator: Accelerator,
        heads: DraftHeads,
        optimizer: Any,
        split: Split,
        skipped: int,
        *,
        of: int,
    ) -> None:
        self.config, self.accelerator, self.split = config, accelerator, split
        self.heads, self.wrapped, self.optimizer = heads, heads.exits, optimizer
        self.steps = range(1, FIT_DRAFTS + 1) if attends(config.head) else None
        self.loss, self.skipped, self.num_batches = float("nan"), skipped, of
        self.alarms = Alarms()
        self.faults: list[str] = []
        self.norms: dict[int, float] = {}
        self.norm: float | None = None

    def learn(self, text: StepText, *, step: int, learning_rate: float) -> dict[str, float]:
        """Do one step; returns the mean loss over its positions, those of all processes, and what went with it.

        Raises:
            DataError: more batches than `max_skipped_batches`, or than half of all, were left out.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.wrapped.train()
        self.faults.clear()
        total = torch.zeros((), device=self.accelerator.device)
        for batch in text.batches:
            with self.accelerator.accumulate(self.wrapped):
                total += self._micro_step(batch, text, step, where=f"step {step + 1}, sequences {batch}")
        counts = torch.tensor(float(len(self.faults)), device=total.device)
        whole = self.accelerator.gather(torch.stack([total, counts])[None]).sum(0)
        self.loss, new = float(whole[0]), int(whole[1])
        if new:
            self._count(new)
        self.alarms.gradients(self.norms)
        norms = {f"fit/gradient/layer_{layer:02d}": norm for layer, norm in self.norms.items()}
        return {"fit/loss": self.loss, "fit/skipped": self.skipped, **norms}

    def _count(self, new: int) -> None:
        self.skipped += new
        for fault in self.faults:
            logger.warning("%s: left out", fault)
        most = self.config.max_skipped_batches
        if self.skipped > min(most, self.num_batches // 2):
            last = gather_object(self.faults)[-1]
            limit = f"max_skipped_batches {most}" if self.skipped > most else f"half of all {self.num_batches}"
            raise DataError(
                f"{self.skipped} batches were left out, more than {limit}; the last: {last}; look at that text, or fit"
                " in float32"
            )

    def _micro_step(self, batch: list[int], text: StepText, turn: int, *, where: str) -> torch.Tensor:
        """One micro-batch; returns its part of the step's mean loss."""
        features = self.split.features(batch)
        part = self._part(features, text, turn)
        left_out = not torch.isfinite(part)
        if left_out:
            self.faults.append(f"{where}: {_fault(features)}")
            # Every process must go backward once, so a batch that is left out gives a gradient of zero.
            part = self._part(_blank(features), text, turn) * 0.0
        # The optimizer averages over processes and micro-batches, but these parts must be summed.
        self.accelerator.backward(part * (self.accelerator.num_processes * len(text.batches)))
        finite = True
        if self.accelerator.sync_gradients:
            self.norms = _norms(self.accelerator.unwrap_model(self.wrapped))
            norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.max_grad_norm)
            self.norm = None if norm is None else float(norm)
            finite = norm is None or math.isfinite(float(norm))
            if not (finite or left_out) and self.accelerator.is_main_process:
                self.faults.append(f"{where}: the gradient is not finite")
        if finite or self.accelerator.scaler is not None:  # the scaler of float16 leaves the step out itself
            self.optimizer.step()
        self.optimizer.zero_grad()
        return part.detach()

    def _part(self, features: Features, text: StepText, turn: int) -> torch.Tensor:
        targets = Targets.of(features.target, features.top_ids, features.top_log_probs, self.heads.target_to_draft)
        context = features.context(self.steps, turn=turn)
        losses = [self._loss(logits, targets) for logits in self.heads(features.hidden, context).values()]
        return torch.stack(losses).mean() * (len(features.target) / text.num_positions)

    def _loss(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Of logits [N, V], or [A, N, V] of as many drafts of each position, the later ones weighing less."""
        if logits.dim() == 2:
            return distillation_loss(logits, targets, kl_weight=self.config.kl_weight)
        weights = [STEP_DECAY**step for step in range(len(logits))]
        each = [distillation_loss(one, targets, kl_weight=self.config.kl_weight) for one in logits]
        return torch.stack([weight * loss for weight, loss in zip(weights, each, strict=True)]).sum() / sum(weights)


def optimizer_for(config: FitConfig, exits: ExitHeads) -> torch.optim.Optimizer:
    """The recipe's optimizer of those parameters that are learnt."""
    learned = [parameter for parameter in exits.parameters() if parameter.requires_grad]
    kind = {"adamw": torch.optim.AdamW, "muon": Muon}[config.optimizer]
    return kind(learned, lr=config.learning_rate, weight_decay=config.weight_decay)


def _norms(heads: Any) -> dict[int, float]:
    """Exit layer -> norm of its head's gradient; nothing where DeepSpeed or FSDP keep gradients to themselves."""
    learned = {int(layer): [p for p in head.parameters() if p.requires_grad] for layer, head in heads.heads.items()}
    gradients = {layer: [p.grad for p in parameters if p.grad is not None] for layer, parameters in learned.items()}
    if not all(type(gradient) is torch.Tensor for each in gradients.values() for gradient in each):
        return {}
    if not any(gradients.values()):
        return {}
    norms = torch.stack([torch.nn.utils.get_total_norm(each) for each in gradients.values()])
    return dict(zip(gradients, norms.tolist(), strict=True))


def _fault(features: Features) -> str:
    """The first place with values that are not finite."""
    bad = [f"hidden states of layer {layer}" for layer, hidden in features.hidden.items() if not _is_finite(hidden)]
    bad += [name for name in ("embedding", "deep", "top_log_probs") if not _is_finite(getattr(features, name))]
    return f"values that are not finite in {', '.join(bad)}" if bad else "the loss is not finite"


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _blank(features: Features) -> Features:
    """Features of the same shapes with zeros for numbers; ids stay."""

    def zeros(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: zeros(entry) for key, entry in value.items()}
        return torch.zeros_like(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return replace(features, **{field.name: zeros(getattr(features, field.name)) for field in fields(features)})
