"""Entry point: fit exit heads on a frozen base, calibrate them, and write the adapter.

Run as `accelerate launch train/fit_exits.py --config configs/fit/NAME.yaml`, or with
`torchrun --nproc_per_node N`; run again with `--resume_from_checkpoint latest` to go on after a stop. The corpus
is made first where it is not there.
"""

import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import set_seed, tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from runtime.errors import ConfigError, SpecBoundError
from runtime.heads import DraftUnembedding, ExitHeads
from runtime.identity import base_fingerprint, weights_sha256
from runtime.layers import DecoderLayers
from train.checkpoints import MetricsLog, load_checkpoint, save_checkpoint
from train.corpus import load_split
from train.distil import make_corpus
from train.evaluate import evaluate
from train.features import FeatureCache, FeatureExtractor, Features, Sequences
from train.losses import Targets, distillation_loss
from train.options import FitConfig, parse_config, validate, validate_against_model
from train.publish import publish_locally
from train.vocabulary import coverage, draft_vocabulary, target_to_draft

logger = logging.getLogger(__name__)

# Settings that may differ between a run and its continuation: they do not change what is learnt.
FREE_TO_CHANGE = {"resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "report_to", "hub_model_id",
                  "license", "schedule", "exit_threshold", "max_exit_layer", "max_draft_tokens", "sources"}  # fmt: skip
EVALUATION_SEQUENCES = 200


@dataclass(slots=True)
class Split:
    """One split of the corpus with the way to its features."""

    sequences: Sequences
    extract: FeatureExtractor
    cache: FeatureCache | None
    device: torch.device

    def features(self, indices: list[int]) -> Features:
        """Features of some sequences on the device, from the cache or from a forward of the base."""
        if self.cache is None:
            return self.extract([self.sequences[index] for index in indices])
        return _to(Features.join([self.cache[index] for index in indices]), self.device)

    def batches(self, batch_size: int, *, limit: int | None = None) -> Iterator[Features]:
        """All sequences in order, up to `limit`."""
        number = len(self.sequences) if limit is None else min(limit, len(self.sequences))
        for start in range(0, number, batch_size):
            yield self.features(list(range(start, min(start + batch_size, number))))


def main(config: FitConfig) -> None:
    """Fit, calibrate and write `output_dir/adapter`.

    Raises:
        SpecBoundError: bad settings, prompts, base or output folder; nothing half-written is left.
    """
    validate(config)
    output_dir = _make_output_dir(config.output_dir)
    accelerator = _make_accelerator(config, output_dir)
    _show_settings(accelerator, config)
    set_seed(config.seed)

    # 1) the frozen base, and text in its own words
    model, tokenizer = load_base(config, accelerator.device)
    layers = DecoderLayers(model)
    vocab_size = layers.unembedding.weight.shape[0]  # type: ignore[union-attr,index]
    validate_against_model(config, num_hidden_layers=layers.num_layers, vocab_size=int(vocab_size))
    before = weights_sha256(model)
    corpus = make_corpus(config, model, tokenizer, state=accelerator.state)
    splits = {name: _make_split(config, accelerator, layers, corpus, name) for name in ("fit", "calibration", "held_out")}

    # 2) the heads, on the tokens the base uses most
    responses = [response for _, response in splits["fit"].sequences.rows]
    keep = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    vocabulary = draft_vocabulary(responses, size=config.draft_vocab_size, vocab_size=int(vocab_size), keep=keep)
    covered = coverage([response for _, response in splits["held_out"].sequences.rows], vocabulary)
    logger.info("draft vocabulary: %d tokens, %.1f %% of held-out text", len(vocabulary), 100 * covered)
    heads = ExitHeads(
        config.head, config.exit_layers, hidden_size=model.config.hidden_size, draft_vocab_size=len(vocabulary),
        rank=config.head_rank,
    )  # fmt: skip
    inverse = target_to_draft(vocabulary, int(vocab_size)).to(accelerator.device)
    unembedding = DraftUnembedding(layers, vocabulary)
    start_from_base(heads, unembedding)

    # 3) fit, calibrate, publish
    heads = fit(config, accelerator, heads, unembedding, inverse, splits)
    if accelerator.is_main_process:
        if weights_sha256(model) != before:
            raise SpecBoundError("the base's weights changed while fitting: this adapter is not to be trusted")
        folder = publish_locally(
            config, model, tokenizer, heads.to(model.dtype), vocabulary, unembedding, inverse,
            calibration=splits["calibration"].batches(config.per_device_train_batch_size),
            evidence={"corpus": _corpus_counts(corpus), "held_out_coverage": covered},
        )  # fmt: skip
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
    """The loop; returns the fitted heads, unwrapped."""
    output_dir = Path(config.output_dir)
    sequences = splits["fit"].sequences
    world = accelerator.num_processes * config.per_device_train_batch_size
    per_epoch = max(1, math.ceil(len(sequences) / world / config.gradient_accumulation_steps))
    total = config.max_steps if config.max_steps > 0 else math.ceil(per_epoch * config.num_train_epochs)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(config.warmup_ratio * total), total)
    wrapped, optimizer = accelerator.prepare(heads, optimizer)
    accelerator.register_for_checkpointing(schedule)
    settings = {key: value for key, value in asdict(config).items() if key not in FREE_TO_CHANGE} | {"world": world}
    step = load_checkpoint(accelerator, config.resume_from_checkpoint, output_dir, settings)
    log = MetricsLog(output_dir / "metrics.jsonl", step=step) if accelerator.is_main_process else None

    bar = tqdm(total=total, initial=step, desc="fit", unit="step", disable=not accelerator.is_main_process)
    started, positions = time.perf_counter(), 0
    stream = batches_from(config, len(sequences), accelerator, step, per_epoch)
    wrapped.train()
    while step < total:
        loss = torch.zeros((), device=accelerator.device)
        for _ in range(config.gradient_accumulation_steps):
            features = splits["fit"].features(next(stream))
            targets = Targets.of(features.target, features.top_ids, features.top_log_probs, inverse)
            with accelerator.accumulate(wrapped):
                logits = wrapped(features.hidden, features.embedding, unembedding)
                losses = [distillation_loss(z, targets, kl_weight=config.kl_weight) for z in logits.values()]
                mean = torch.stack(losses).mean()
                accelerator.backward(mean)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss += mean.detach() / config.gradient_accumulation_steps
            positions += len(features.target) * accelerator.num_processes
        schedule.step()
        step += 1
        values = {"fit/loss": float(accelerator.reduce(loss, "mean")), "fit/learning_rate": schedule.get_last_lr()[0]}
        if step % per_epoch == 0 or step == total:
            wrapped.eval()
            held_out = splits["held_out"].batches(config.per_device_train_batch_size, limit=EVALUATION_SEQUENCES)
            values |= evaluate(held_out, wrapped, unembedding, inverse, kl_weight=config.kl_weight)
            wrapped.train()
            _show_figures(accelerator, step, values)
        if log is not None:
            log.write(step, values)
        if step % config.logging_steps == 0 or step == total:
            accelerator.log(values, step=step)
        bar.set_postfix_str(f"loss {values['fit/loss']:.3f}, {positions / (time.perf_counter() - started):.0f} tokens/s")
        bar.update()
        if step % config.save_steps == 0 or step == total:
            save_checkpoint(accelerator, output_dir, step, settings, keep=config.save_total_limit)
    bar.close()
    fitted: ExitHeads = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).eval()
    return fitted


def batches_from(config: FitConfig, number: int, accelerator: Accelerator, step: int, per_epoch: int) -> Iterator[list[int]]:
    """This process's batches of sequence indices from `step` on, without end.

    The order of an epoch depends on seed and epoch alone, so a continued run sees what an uninterrupted one would.
    """
    size = config.per_device_train_batch_size
    world = size * accelerator.num_processes
    epoch, micro = divmod(step, per_epoch)
    micro *= config.gradient_accumulation_steps
    while True:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(number, generator=generator).tolist()
        while len(order) < per_epoch * config.gradient_accumulation_steps * world:  # a full last batch
            order += order[: per_epoch * config.gradient_accumulation_steps * world - len(order)]
        for index in range(micro, per_epoch * config.gradient_accumulation_steps):
            start = index * world + accelerator.process_index * size
            yield order[start : start + size]
        epoch, micro = epoch + 1, 0


def load_base(config: FitConfig, device: torch.device) -> tuple[Any, Any]:
    """The frozen base and its tokenizer.

    Raises:
        ConfigError: it cannot be loaded.
    """
    name, revision = config.model_name_or_path, config.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model_name_or_path {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return model.to(device).requires_grad_(False).eval(), tokenizer


def start_from_base(heads: ExitHeads, unembedding: DraftUnembedding) -> None:
    """A linear head starts as the base's own unembedding rows."""
    for head in heads.heads.values():
        if hasattr(head, "weight"):
            with torch.no_grad():
                head.weight.copy_(unembedding.weight)


def _make_output_dir(name: str) -> Path:
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir {name!r} cannot be written: {error.strerror}") from None
    return path


def _make_accelerator(config: FitConfig, output_dir: Path) -> Accelerator:
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=config.report_to or None,
            project_dir=str(output_dir),
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"report_to {config.report_to}: {error}") from None
    if accelerator.state.deepspeed_plugin is not None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
    if config.report_to:
        plain = {key: value for key, value in asdict(config).items() if isinstance(value, (int, float, str, bool))}
        accelerator.init_trackers("specbound", config=plain)
    return accelerator


def _make_split(config: FitConfig, accelerator: Accelerator, layers: DecoderLayers, corpus: Path, name: str) -> Split:
    sequences = Sequences.from_corpus(load_split(corpus, name), max_length=config.max_length, name=name)
    if sequences.num_dropped:
        logger.info("%s: %d rows dropped, nothing left of them in %d tokens", name, sequences.num_dropped, config.max_length)
    extract = FeatureExtractor(layers, config.exit_layers, top_k=config.teacher_top_k)
    cache = None
    if config.features == "cache":
        settings = {"base": base_fingerprint(layers.model), "dtype": config.dtype, "exits": config.exit_layers,
                    "top_k": config.teacher_top_k, "max_length": config.max_length,
                    "corpus": (corpus / "corpus.json").read_text(encoding="utf-8")}  # fmt: skip
        cache = FeatureCache(Path(config.output_dir) / "features" / name, settings)
        bar = tqdm(total=len(sequences), desc=f"features {name}", unit="text", disable=not accelerator.is_main_process)
        rank, world = accelerator.process_index, accelerator.num_processes
        for done in cache.fill(sequences, extract, batch_size=config.per_device_train_batch_size, rank=rank, world_size=world):
            bar.update(done - bar.n)
        bar.close()
        accelerator.wait_for_everyone()
    return Split(sequences, extract, cache, accelerator.device)


def _to(features: Features, device: torch.device) -> Features:
    values = {name: getattr(features, name).to(device) for name in ("embedding", "target", "top_ids", "top_log_probs")}
    hidden = {layer: tensor.to(device) for layer, tensor in features.hidden.items()}
    return Features(hidden=hidden, lengths=features.lengths, **values)


def _corpus_counts(corpus: Path) -> Any:
    import json

    return json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))["counts"]


def _show_settings(accelerator: Accelerator, config: FitConfig) -> None:
    if accelerator.is_main_process:
        for name, source in config.sources.items():
            if source != "default":
                logger.info("%s = %s (%s)", name, getattr(config, name), source)
        logger.info("%d process(es), %s, mixed precision %s", accelerator.num_processes, accelerator.device,
                    accelerator.mixed_precision)  # fmt: skip


def _show_figures(accelerator: Accelerator, step: int, values: dict[str, float]) -> None:
    if accelerator.is_main_process:
        for key in sorted(key for key in values if "/agreement/" in key):
            of = {name: values[key.replace("agreement", name)] for name in ("acceptance", "precision", "coverage")}
            tqdm.write(
                f"step {step} {key.rpartition('/')[2]}: agreement {values[key]:.3f}, expected acceptance "
                f"{of['acceptance']:.3f}, at confidence 0.8 precision {of['precision']:.3f} coverage {of['coverage']:.3f}"
            )


def _run() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    try:
        main(parse_config(sys.argv[1:]))
    except SpecBoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _run()
