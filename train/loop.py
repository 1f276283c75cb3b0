"""The loop of a fit: steps, held-out figures, checkpoints, log. Knows no base model and no adapter files."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm

from runtime.heads import DraftUnembedding, ExitHeads
from train.calibrated import counted_costs
from train.checkpoints import MetricsLog, load_checkpoint, save_checkpoint
from train.evaluate import evaluate, show
from train.losses import Targets, distillation_loss
from train.options import FitConfig
from train.plan import Plan, StepText
from train.simulate import Simulation
from train.splits import Split

# Settings that may differ between a run and its continuation: they do not change what is learnt.
FREE_TO_CHANGE = {
    "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "report_to",
    "license", "schedule", "exit_threshold", "max_exit_layer", "max_draft_tokens", "sources", "output_dir",
    "corpus_dir", "features", "push_to_hub", "hub_model_id",
}  # fmt: skip
EVALUATION_SEQUENCES = 64


def fit(
    config: FitConfig,
    accelerator: Accelerator,
    heads: ExitHeads,
    unembedding: DraftUnembedding,
    inverse: torch.Tensor,
    splits: dict[str, Split],
) -> ExitHeads:
    """Fit the heads, from the start or from a checkpoint; returns them, unwrapped, in evaluation mode.

    Args:
        heads: on any device; those parameters that require a gradient are fitted.
        inverse: target id -> draft id, shape [vocabulary], int64, -1 where there is none.
        splits: `fit` and `held_out`.

    Raises:
        ConfigError: the checkpoint to continue from is not whole, or was made with other settings.
    """
    lengths = [len(response) for _, response in splits["fit"].sequences.rows]
    plan = Plan(config, lengths, rank=accelerator.process_index, world_size=accelerator.num_processes)
    learned = [parameter for parameter in heads.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=config.learning_rate, weight_decay=config.weight_decay)
    ages = heads.ages
    wrapped, optimizer = accelerator.prepare(heads, optimizer)
    settings = {key: value for key, value in asdict(config).items() if key not in FREE_TO_CHANGE}
    settings["num_processes"] = accelerator.num_processes
    output_dir = Path(config.output_dir)
    step = load_checkpoint(accelerator, config.resume_from_checkpoint, output_dir, settings)
    if step >= plan.total:
        accelerator.print(f"the fit is already complete: {step} of {plan.total} steps are done")
    base = splits["held_out"].extract.layers.model
    held_out = splits["held_out"].sequences.rows[:EVALUATION_SEQUENCES]
    simulation = Simulation(held_out, counted_costs(base, heads, unembedding))
    log = MetricsLog(output_dir / "metrics.jsonl", step=step) if accelerator.is_main_process else None
    learner = _Learner(config, accelerator, wrapped, optimizer, unembedding, inverse, splits["fit"])
    for text in _progress(plan, step, learner):
        rate = plan.learning_rate(step)
        values = {"fit/loss": learner.learn(text, learning_rate=rate, turn=step)}
        step += 1
        if plan.ends_epoch(step):
            batches = splits["held_out"].batches(config.per_device_train_batch_size, limit=EVALUATION_SEQUENCES)
            wrapped.eval()  # on its own line: DeepSpeed's engine returns None
            values |= evaluate(
                batches,
                wrapped,
                unembedding,
                inverse,
                kl_weight=config.kl_weight,
                ages=ages,
                simulation=simulation,
            )
            accelerator.print(show(step, values))
        if log is not None:
            log.write(step, values | {"fit/learning_rate": rate})
        if step % config.logging_steps == 0 or step == plan.total:
            accelerator.log(values, step=step)
        if step % config.save_steps == 0 or step == plan.total:
            save_checkpoint(accelerator, output_dir, step, settings, keep=config.save_total_limit)
    # Without the wrapper that computes in mixed precision: an adapter is measured as it will be used.
    fitted: ExitHeads = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return fitted.eval()


class _Learner:
    """One optimizer step at a time, and the figures that the bar shows."""

    def __init__(
        self,
        config: FitConfig,
        accelerator: Accelerator,
        wrapped: Any,
        optimizer: Any,
        unembedding: DraftUnembedding,
        inverse: torch.Tensor,
        split: Split,
    ) -> None:
        self.config, self.accelerator, self.split = config, accelerator, split
        self.wrapped, self.optimizer = wrapped, optimizer
        self.unembedding, self.inverse = unembedding, inverse
        self.loss, self.positions = float("nan"), 0

    def learn(self, text: StepText, *, learning_rate: float, turn: int) -> float:
        """Do one step, the `turn`-th; returns the mean loss over its positions, those of all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.wrapped.train()
        total = torch.zeros((), device=self.accelerator.device)
        for batch in text.batches:
            with self.accelerator.accumulate(self.wrapped):
                total += self._micro_step(batch, text, turn)
        self.positions += text.num_positions
        self.loss = float(self.accelerator.reduce(total, "sum"))
        return self.loss

    def _micro_step(self, batch: list[int], text: StepText, turn: int) -> torch.Tensor:
        """One micro-batch; returns its part of the step's mean loss."""
        features = self.split.features(batch)
        targets = Targets.of(features.target, features.top_ids, features.top_log_probs, self.inverse)
        logits = self.wrapped(features.hidden, features.context(turn=turn), self.unembedding)
        losses = [distillation_loss(z, targets, kl_weight=self.config.kl_weight) for z in logits.values()]
        part = torch.stack(losses).mean() * (len(features.target) / text.num_positions)
        # What follows averages over processes and micro-batches; the parts are to be summed.
        self.accelerator.backward(part * (self.accelerator.num_processes * len(text.batches)))
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return part.detach()


def _progress(plan: Plan, step: int, learner: _Learner) -> Any:
    """The steps from `step` on, under a bar with the loss and the response tokens per second."""
    started = time.perf_counter()
    with tqdm(total=plan.total, initial=step, desc="fit", unit="step") as bar:
        for text in plan.text(step):
            yield text
            rate = learner.positions / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {learner.loss:.3f}, {rate:.0f} tokens/s", refresh=False)
            bar.update()
