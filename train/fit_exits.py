"""Entry point: fit exit heads on a frozen base, calibrate them, and write the adapter.

Run as `accelerate launch train/fit_exits.py --config configs/fit/NAME.yaml`, or with
`torchrun --nproc_per_node N`; run again with `--resume_from_checkpoint latest` to go on after a stop. The corpus
is made first where it is not there.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from transformers.utils import logging as transformers_logging

from runtime.errors import ConfigError, SpecBoundError
from runtime.heads import DraftUnembedding, ExitHeads, LinearHead
from runtime.identity import weights_sha256
from runtime.layers import DecoderLayers
from train.checkpoints import MetricsLog, load_checkpoint, save_checkpoint
from train.distil import load_base, make_corpus
from train.evaluate import evaluate, show
from train.losses import Targets, distillation_loss
from train.options import FitConfig, parse_config, validate, validate_against_model
from train.publish import publish_locally
from train.splits import Split
from train.vocabulary import coverage, draft_vocabulary, target_to_draft

logger = logging.getLogger(__name__)

# Settings that may differ between a run and its continuation: they do not change what is learnt.
FREE_TO_CHANGE = {
    "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "report_to", "hub_model_id",
    "license", "schedule", "exit_threshold", "max_exit_layer", "max_draft_tokens", "sources", "output_dir",
    "corpus_dir", "features",
}  # fmt: skip
EVALUATION_SEQUENCES = 200


def main(config: FitConfig) -> None:
    """Fit, calibrate and write `output_dir/adapter`.

    Raises:
        SpecBoundError: bad settings, prompts, base or output folder; nothing half-written is left.
    """
    validate(config)
    make_output_dir(config.output_dir)
    accelerator = make_accelerator(config)
    show_settings(accelerator, config)
    set_seed(config.seed)

    # 1) the frozen base, and text in its own words
    model, tokenizer = load_base(config)
    layers = DecoderLayers(model.to(accelerator.device).requires_grad_(False).eval())
    vocab_size: int = model.get_output_embeddings().weight.shape[0]
    validate_against_model(config, num_hidden_layers=layers.num_layers, vocab_size=vocab_size)
    before = weights_sha256(model)
    corpus = make_corpus(config, model, tokenizer, state=accelerator.state)
    splits = {
        name: Split.load(config, accelerator, layers, name) for name in ("fit", "calibration", "held_out")
    }

    # 2) the heads, on the tokens the base uses most
    responses = {name: [response for _, response in split.sequences.rows] for name, split in splits.items()}
    keep = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    vocabulary = draft_vocabulary(
        responses["fit"], size=config.draft_vocab_size, vocab_size=vocab_size, keep=keep
    )
    covered = coverage(responses["held_out"], vocabulary)
    unembedding = DraftUnembedding(layers, vocabulary)
    heads = make_heads(config, model.config.hidden_size, unembedding)
    inverse = target_to_draft(vocabulary, vocab_size).to(accelerator.device)

    # 3) fit, calibrate, publish
    heads = fit(config, accelerator, heads, unembedding, inverse, splits)
    if weights_sha256(model) != before:
        raise SpecBoundError("the base's weights changed while fitting: this adapter is not to be trusted")
    if accelerator.is_main_process:
        folder = publish_locally(
            config,
            model,
            tokenizer,
            heads.to(model.dtype),
            vocabulary,
            unembedding,
            inverse,
            calibration=splits["calibration"].batches(config.per_device_train_batch_size),
            evidence={
                "corpus": json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))["counts"],
                "held_out_coverage": covered,
                "base_weights_sha256": before,
            },
        )
        logger.info("adapter: %s (base unchanged, sha256 %s)", folder, before[:16])
    accelerator.wait_for_everyone()
    accelerator.end_training()


def fit(
    config: FitConfig,
    accelerator: Accelerator,
    heads: ExitHeads,
    unembedding: DraftUnembedding,
    inverse: torch.Tensor,
    splits: dict[str, Split],
) -> ExitHeads:
    """The loop; returns the fitted heads, unwrapped.

    Args:
        inverse: target id -> draft id, shape [vocabulary], -1 where there is none.
    """
    output_dir, world = Path(config.output_dir), accelerator.num_processes * config.per_device_train_batch_size
    micro_steps = config.gradient_accumulation_steps
    per_epoch = max(1, math.ceil(len(splits["fit"].sequences) / world / micro_steps))
    total = config.max_steps if config.max_steps > 0 else math.ceil(per_epoch * config.num_train_epochs)
    optimizer = torch.optim.AdamW(
        heads.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    wrapped, optimizer = accelerator.prepare(heads, optimizer)
    settings = {key: value for key, value in asdict(config).items() if key not in FREE_TO_CHANGE}
    settings["world"] = world
    step = load_checkpoint(accelerator, config.resume_from_checkpoint, output_dir, settings)
    log = MetricsLog(output_dir / "metrics.jsonl", step=step) if accelerator.is_main_process else None
    bar = tqdm(total=total, initial=step, desc="fit", unit="step")
    started, positions = time.perf_counter(), 0
    stream = batches_from(config, len(splits["fit"].sequences), accelerator, step, per_epoch)
    wrapped.train()
    while step < total:
        set_learning_rate(optimizer, config, step, total)
        loss = torch.zeros((), device=accelerator.device)
        for _ in range(micro_steps):
            features = splits["fit"].features(next(stream))
            targets = Targets.of(features.target, features.top_ids, features.top_log_probs, inverse)
            with accelerator.accumulate(wrapped):
                logits = wrapped(features.hidden, features.embedding, unembedding)
                each = [distillation_loss(z, targets, kl_weight=config.kl_weight) for z in logits.values()]
                mean = torch.stack(each).mean()
                accelerator.backward(mean)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss += mean.detach() / micro_steps
            positions += len(features.target) * accelerator.num_processes
        step += 1
        values = {"fit/loss": float(accelerator.reduce(loss, "mean"))}
        if step % per_epoch == 0 or step == total:
            batches = splits["held_out"].batches(config.per_device_train_batch_size, limit=EVALUATION_SEQUENCES)
            values |= evaluate(batches, wrapped.eval(), unembedding, inverse, kl_weight=config.kl_weight)
            wrapped.train()
            accelerator.print(show(step, values))
        if log is not None:
            log.write(step, values | {"fit/learning_rate": optimizer.param_groups[0]["lr"]})
        if step % config.logging_steps == 0 or step == total:
            accelerator.log(values, step=step)
        rate = positions / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {values['fit/loss']:.3f}, {rate:.0f} tokens/s")
        bar.update()
        if step % config.save_steps == 0 or step == total:
            save_checkpoint(accelerator, output_dir, step, settings, keep=config.save_total_limit)
    bar.close()
    fitted: ExitHeads = accelerator.unwrap_model(wrapped)
    return fitted.eval()


def batches_from(
    config: FitConfig, number: int, accelerator: Accelerator, step: int, per_epoch: int
) -> Iterator[list[int]]:
    """This process's batches of sequence indices from `step` on, without end.

    The order of an epoch depends on seed and epoch alone, so a continued run sees what an uninterrupted one would.
    """
    size = config.per_device_train_batch_size
    world = size * accelerator.num_processes
    batches = per_epoch * config.gradient_accumulation_steps
    epoch, step_in_epoch = divmod(step, per_epoch)
    first = step_in_epoch * config.gradient_accumulation_steps
    while True:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(number, generator=generator).tolist()
        order = (order * math.ceil(batches * world / number))[: batches * world]  # fills the last batch
        for index in range(first, batches):
            start = index * world + accelerator.process_index * size
            yield order[start : start + size]
        epoch, first = epoch + 1, 0


def set_learning_rate(optimizer: Any, config: FitConfig, step: int, total: int) -> None:
    """Linear warm-up, then half a cosine to zero: a function of the step alone, so nothing to save."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor


def make_heads(config: FitConfig, hidden_size: int, unembedding: DraftUnembedding) -> ExitHeads:
    """New heads; a linear head starts as the base's own unembedding rows."""
    heads = ExitHeads(
        config.head,
        config.exit_layers,
        hidden_size=hidden_size,
        draft_vocab_size=unembedding.weight.shape[0],
        rank=config.head_rank,
    )
    for head in heads.heads.values():
        if isinstance(head, LinearHead):
            head.weight.data.copy_(unembedding.weight)
    return heads


def make_output_dir(name: str) -> None:
    """Create the output folder and see that it can be written, before anything is loaded.

    Raises:
        ConfigError: it cannot.
    """
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir {name!r} cannot be written ({error.strerror}): name another") from None


def make_accelerator(config: FitConfig) -> Accelerator:
    """Device, processes, precision and trackers, as `accelerate launch` or `torchrun` set them.

    Raises:
        ConfigError: a tracker that is not installed.
    """
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=config.report_to or None,
            project_dir=config.output_dir,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"report_to {config.report_to}: {error}") from None
    if accelerator.state.deepspeed_plugin is not None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
    if config.report_to:
        plain = {name: value for name, value in asdict(config).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("specbound", config=plain)
    return accelerator


def show_settings(accelerator: Accelerator, config: FitConfig) -> None:
    """Print every setting that is not a default, and where it came from."""
    for name, source in config.sources.items():
        if source != "default":
            accelerator.print(f"{name} = {getattr(config, name)} ({source})")
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, "
        f"mixed precision {accelerator.mixed_precision}"
    )


def run() -> None:
    """The command line: one line and exit code 1 for any error of the user's."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.set_verbosity_error()
    try:
        main(parse_config(sys.argv[1:]))
    except SpecBoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
