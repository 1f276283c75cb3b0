"""The loop of a fit: steps, held-out figures, checkpoints, log. Knows no base model and no adapter files."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, tqdm

from runtime.adapter.identity import file_sha256
from runtime.drafting.draft_heads import DraftHeads
from train.features.split import Split
from train.features.spread import shaped
from train.fitting.alarms import Divergence, name_dead_heads
from train.fitting.checkpoints import FitState, load_best, load_checkpoint, save_checkpoint
from train.fitting.curves import draw_curves
from train.fitting.flops import FitFlops
from train.fitting.interrupts import StopSignals, exit_code
from train.fitting.learner import Learner, optimizer_for
from train.fitting.log import MetricsLog, read_log
from train.fitting.quality import evaluate, show
from train.fitting.schedule import Plan
from train.fitting.throughput import Speed
from train.replay.costs import CostTable, counted_costs
from train.replay.simulation import Simulation
from train.settings.fit_config import FitConfig

# Settings that may differ between a run and its continuation: they do not change what is learnt.
FREE_TO_CHANGE = {
    "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "report_to", "max_skipped_batches",
    "load_best_model_at_end", "eval_steps", "early_stopping_patience", "generator", "dry_run",
    "license", "schedule", "exit_threshold", "max_exit_layer", "max_draft_tokens", "sources", "output_dir",
    "corpus_dir", "answers", "features", "features_dir", "push_to_hub", "hub_model_id",
}  # fmt: skip


def fit(
    config: FitConfig,
    accelerator: Accelerator,
    heads: DraftHeads,
    splits: dict[str, Split],
    stop: StopSignals,
) -> DraftHeads:
    """Fit the heads, from the start or from a checkpoint; returns the best, unwrapped, in evaluation mode.

    Args:
        heads: on any device; those parameters that require a gradient are fitted.
        splits: `fit` and `held_out`.
        stop: looked at after every step.

    Raises:
        ConfigError: the checkpoint to continue from is not whole, or was made with other settings; or the loss stays
            above its start.
        DataError: too many batches gave no finite loss.
        SystemExit: a signal came; the steps done are in a checkpoint.
    """
    lengths = [(len(prompt), len(response)) for prompt, response in splits["fit"].sequences.rows]
    responses = [response for _, response in lengths]
    plan = Plan(config, responses, rank=accelerator.process_index, world_size=accelerator.num_processes)
    base = splits["fit"].extract.layers.model
    flops = FitFlops.of(shaped(base), heads.exits)
    speed = Speed(flops, lengths, accelerator.device)
    accelerator.print(f"{plan.total} steps; with its heads the fit costs {speed.cost():.2f} times the base's forward")
    costs = counted_costs(base, heads)
    ages = heads.exits.one.ages
    wrapped, optimizer = accelerator.prepare(heads.exits, optimizer_for(config, heads.exits))
    settings = {key: value for key, value in asdict(config).items() if key not in FREE_TO_CHANGE}
    settings |= {"num_processes": accelerator.num_processes, "max_length": config.longest}
    settings["corpus"] = file_sha256(config.corpus_path / "corpus.json")  # of prompts, base and how it answered
    state = load_checkpoint(accelerator, config.resume_from_checkpoint, Path(config.output_dir), settings)
    if complete := _is_over(config, plan, state):
        accelerator.print(f"the fit is already complete: {complete}")
    fitting = heads.with_exits(wrapped)
    learner = Learner(config, accelerator, fitting, optimizer, splits["fit"], state.skipped, of=plan.num_batches)
    judge = _Judge(config, learner, splits["held_out"], costs, ages)
    with stop.waiting():
        _steps(config, plan, state, learner, judge, speed, settings, stop)
    if config.load_best_model_at_end and (best := load_best(accelerator, Path(config.output_dir))) is not None:
        foretold = f"{best.score:.2f}x by layer counts in replay"
        accelerator.print(f"the adapter is made from step {best.step} of {plan.total}, the best: {foretold}")
    if accelerator.is_main_process:
        log = Path(config.output_dir) / "metrics.jsonl"
        draw_curves(log, Path(config.output_dir) / "curves.png")
        name_dead_heads(read_log(log), config.learning_rate)
    # Without the wrapper that computes in mixed precision: an adapter is measured as it will be used.
    fitted = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return heads.with_exits(fitted.eval())


def _steps(
    config: FitConfig,
    plan: Plan,
    state: FitState,
    learner: Learner,
    judge: "_Judge",
    speed: Speed,
    settings: dict[str, Any],
    stop: StopSignals,
) -> None:
    """The steps still to do, with their lines in the log and their checkpoints."""
    accelerator, output_dir = learner.accelerator, Path(config.output_dir)
    log = MetricsLog(output_dir / "metrics.jsonl", step=state.step) if accelerator.is_main_process else None
    guard = Divergence.of(config, total=plan.total, vocabulary=len(learner.heads.draft_to_target))
    with tqdm(total=plan.total, initial=state.step, desc="fit", unit="step") as bar:
        for text in () if _is_over(config, plan, state) else plan.text(state.step):
            rate = plan.learning_rate(state.step)
            values = learner.learn(text, step=state.step, learning_rate=rate) | {"fit/learning_rate": rate}
            whole = learner.skipped == state.skipped
            state = replace(state, step=state.step + 1, skipped=learner.skipped, score=None)
            values |= speed.step(text, left=plan.total - state.step, cached=learner.split.cache is not None)
            bar.set_postfix_str(f"loss {learner.loss:.3f}, {speed.line(values)}", refresh=False)
            bar.update()
            if plan.is_evaluated(state.step):
                values |= judge.evaluate(state.step)
                state = judge.scored(state, values)
            if log is not None:
                log.write(state.step, values)
            if state.step % config.logging_steps == 0 or plan.is_evaluated(state.step):
                accelerator.log(values, step=state.step)
            state = guard.look(state, learner.loss, norm=learner.norm, whole=whole)
            signal = _agreed(accelerator, stop.received)
            is_best = state.score is not None and state.score == state.best
            over = _is_over(config, plan, state)
            if signal or is_best or over or state.step % config.save_steps == 0:
                save_checkpoint(accelerator, output_dir, state, settings, keep=config.save_total_limit)
            if signal:
                accelerator.print(f"stopped after step {state.step}: --resume_from_checkpoint latest goes on")
                accelerator.end_training()
                raise SystemExit(exit_code(signal))
            if over and state.step < plan.total:
                accelerator.print(f"the fit ends: {over}")
                return
            speed.pause()


def _is_over(config: FitConfig, plan: Plan, state: FitState) -> str:
    """Why there is no step to do after these, in words; nothing where there is one."""
    if state.step >= plan.total:
        return f"{state.step} of {plan.total} steps are done"
    if config.early_stopping_patience is None or state.waited < config.early_stopping_patience:
        return ""
    return (
        f"step {state.step} of {plan.total}, no predicted speed-up above {state.best:.2f} in {state.waited}"
        f" evaluations (early_stopping_patience {config.early_stopping_patience})"
    )


def _agreed(accelerator: Accelerator, signal: int) -> int:
    """The signal that any process got, on all of them; 0 where none did."""
    received = torch.tensor([signal], device=accelerator.device)
    return int(accelerator.gather(received).max())


class _Judge:
    """Figures of the heads on held-out text, and which of them were the best so far."""

    def __init__(
        self, config: FitConfig, learner: Learner, split: Split, costs: CostTable, ages: Sequence[int]
    ) -> None:
        self.config, self.learner, self.split, self.ages = config, learner, split, ages
        self.number = max(1, split.num_judges)
        self.simulation = Simulation(split.sequences.rows[: self.number], costs)

    def evaluate(self, step: int) -> dict[str, float]:
        """Agreement, acceptance and what replay says, with an alarm for each head that is no better than chance."""
        batches = self.split.batches(self.config.per_device_train_batch_size, end=self.number)
        learner = self.learner
        learner.wrapped.eval()  # on its own line: DeepSpeed's engine returns None
        values = evaluate(
            batches,
            learner.heads,
            kl_weight=self.config.kl_weight,
            ages=self.ages,
            simulation=self.simulation,
        )
        learner.accelerator.print(show(step, values))
        if learner.accelerator.is_main_process:
            values |= learner.alarms.agreement(values, values["held_out/chance"])
        return values

    def scored(self, state: FitState, values: dict[str, float]) -> FitState:
        """The state with its score; the main process's, since those of others may differ in the last bit."""
        score = broadcast_object_list([values.get("held_out/predicted_speedup")])[0]
        if score is None:
            return state
        if state.best is None or score > state.best:
            return replace(state, score=score, best=score, waited=0)
        return replace(state, score=score, waited=state.waited + 1)
