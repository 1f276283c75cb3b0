"""Entry point: fit exit heads on a frozen base, calibrate them, and write the adapter.

Run it as `accelerate launch train/fit_exits.py --config configs/fit/NAME.yaml`, or with
`torchrun --nproc_per_node N`. After a stop, add `--resume_from_checkpoint latest` to continue. If there is
no corpus yet, it is made first.
"""

import logging
import sys
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from runtime.adapter.folder import Adapter, load_adapter
from runtime.adapter.hub import resolve_adapter
from runtime.adapter.identity import weights_sha256
from runtime.base import check_base
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.errors import ConfigError, DataError, SpecBoundError
from runtime.files import naming
from train.calibration.calibration import unseen_rows
from train.calibration.temperatures import require_positions
from train.corpus.corpus import counts_of
from train.corpus.options import CorpusOptions
from train.distil import load_base, make_corpus, require_prompts
from train.features.disk import bytes_per_position, require_disk
from train.features.split import Split
from train.features.spread import decoder_layers, is_spread, take_from_launcher, whole_parameters
from train.features.vocabulary import coverage, draft_vocabulary, vocabulary_line
from train.fitting.interrupts import StopSignals
from train.fitting.launch import (
    check_output_dir,
    make_accelerator,
    memory_for,
    one_line_errors,
    quiet_logs,
    show_settings,
    sole_writer,
    start_trackers,
)
from train.fitting.loop import fit
from train.fitting.lora import use_peft, without_peft
from train.planning.rehearsal import rehearse
from train.publishing.assembly import write_adapter
from train.publishing.publish import check_can_push, publish
from train.settings.fit_config import FitConfig, parse_config, validate, validate_against_model

logger = logging.getLogger(__name__)


def main(config: FitConfig) -> None:
    """Fit, calibrate and write `output_dir/adapter`; with `dry_run` only say what that takes.

    Raises:
        SpecBoundError: settings, prompts, base or output folder cannot be used. No unfinished adapter is left.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM. A fit in progress saves a checkpoint first.
    """
    validate(config)
    require_prompts(config)
    check_output_dir(config)
    if config.push_to_hub:
        check_can_push(config)
    with StopSignals() as stop, naming(Path(config.output_dir)), sole_writer(config):
        _main(config, stop)


def _main(config: FitConfig, stop: StopSignals) -> None:
    spread = take_from_launcher()
    accelerator = make_accelerator(config, spread)
    show_settings(accelerator, config)
    earlier = _earlier(config)

    # 1) the frozen base, and the corpus of its answers
    layers, tokenizer = _load(config, accelerator, spread)
    model, vocab_size = layers.model, cast(Tensor, layers.unembedding.weight).shape[0]
    validate_against_model(config, num_hidden_layers=layers.num_layers, vocab_size=vocab_size)
    if earlier is not None:
        check_base(model, tokenizer, earlier, strict=False)
    if config.dry_run:
        accelerator.print(_rehearsed(config, layers, tokenizer, vocab_size, accelerator))
        return
    before = weights_sha256(model, whole_parameters(model))
    then = ", with another corpus_dir"
    with memory_for("answering prompts", "generation_batch_size", config.generation_batch_size, then=then):
        corpus = make_corpus(config, model, tokenizer, state=accelerator.state)
    splits = _load_splits(config, accelerator, layers)

    # 2) the heads, on the tokens the base uses most
    vocabulary, covered = _vocabulary(config, tokenizer, splits, vocab_size, earlier)
    accelerator.print(vocabulary_line(vocabulary, covered, splits["fit"].sequences.rows))
    set_seed(config.seed)  # only here, so that earlier random draws do not change the new heads
    heads = make_heads(config, layers, vocabulary, earlier)

    # 3) fit, calibrate, publish
    start_trackers(accelerator, config)
    then = " and raise gradient_accumulation_steps, with another output_dir"
    with memory_for("fitting", "per_device_train_batch_size", config.per_device_train_batch_size, then=then):
        heads = without_peft(fit(config, accelerator, heads, splits, stop))
    if weights_sha256(model, whole_parameters(model)) != before:
        raise SpecBoundError("the base's weights changed while fitting: no adapter is written; fit again")
    if accelerator.is_main_process or is_spread(model):  # every process runs its part of a sharded base
        folder = write_adapter(
            config,
            model,
            tokenizer,
            heads.with_exits(heads.exits.to(model.dtype)),
            splits=splits,
            write=accelerator.is_main_process,
            evidence={"corpus": counts_of(corpus), "held_out_coverage": covered, "base_weights_sha256": before},
        )
        accelerator.print(f"adapter: {folder} (base unchanged, sha256 {before[:16]})")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if config.push_to_hub and accelerator.is_main_process:  # last, so that a failure of the Hub costs nothing else
        published = publish(Path(config.output_dir) / "adapter", str(config.hub_model_id))
        logger.info("published: %s commit %s", published.url, published.commit)


def _rehearsed(
    config: FitConfig, layers: DecoderLayers, tokenizer: Any, vocab_size: int, accelerator: Accelerator
) -> Any:
    """What the fit would take."""
    heads = make_heads(config, layers, torch.arange(config.draft_vocab_size or vocab_size))
    with memory_for("rehearsing", "per_device_train_batch_size", config.per_device_train_batch_size, then=""):
        return rehearse(config, layers, tokenizer, CorpusOptions.of(config), heads, accelerator)


def _load(config: FitConfig, accelerator: Accelerator, spread: str | None) -> tuple[DecoderLayers, Any]:
    """Load the frozen base onto the devices, and its tokenizer."""
    model, tokenizer = load_base(config, spread)
    if is_spread(model):
        accelerator.print(f"the base is spread over the processes by {spread}")
        return decoder_layers(model), tokenizer
    return DecoderLayers(model.to(accelerator.device).requires_grad_(False).eval()), tokenizer


def _earlier(config: FitConfig) -> Adapter | None:
    """The adapter whose heads the fit begins with, where one is named.

    Raises:
        AdapterError: it cannot be read.
        ConfigError: its heads are of another kind or size than the recipe's.
    """
    if config.init_adapter is None:
        return None
    adapter = load_adapter(resolve_adapter(config.init_adapter))
    own = adapter.config
    for name, theirs in {"head": own.head, "head_rank": own.head_rank, "exit_layers": list(own.exit_layers)}.items():
        if getattr(config, name) != theirs:
            raise ConfigError(f"{name}: expected {theirs!r}, as init_adapter has; got {getattr(config, name)!r}")
    size, whole = config.draft_vocab_size or own.vocab_size, own.draft_vocab_size
    if size != whole:
        raise ConfigError(f"draft_vocab_size: expected {whole}, as init_adapter has; got {size}")
    return adapter


def _vocabulary(
    config: FitConfig, tokenizer: Any, splits: dict[str, Split], vocab_size: int, earlier: Adapter | None
) -> tuple[Tensor, float]:
    """Choose the draft vocabulary: the target id of each draft id, and the share of held-out tokens it covers."""
    responses = {name: [response for _, response in split.sequences.rows] for name, split in splits.items()}
    keep = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if earlier is not None:
        vocabulary = earlier.draft_to_target
    else:
        vocabulary = draft_vocabulary(responses["fit"], size=config.draft_vocab_size, vocab_size=vocab_size, keep=keep)
    return vocabulary, coverage(responses["held_out"], vocabulary)


def _load_splits(config: FitConfig, accelerator: Accelerator, layers: DecoderLayers) -> dict[str, Split]:
    """Load the three splits; raises DataError if calibration has too few positions or shares prompts with the fit."""
    splits = {name: Split.load(config, layers, name) for name in ("fit", "calibration", "held_out")}
    require_positions(sum(len(response) for _, response in splits["calibration"].sequences.rows))
    unseen_rows(splits["held_out"])

    def asked(row: tuple[list[int], list[int]]) -> tuple[int, ...]:
        prompt, response = row  # a text without roles is its own answer, behind its first token
        return tuple(prompt if len(prompt) > 1 else prompt + response)

    seen = set(map(asked, splits["fit"].sequences.rows))
    shared = sum(asked(row) in seen for row in splits["calibration"].sequences.rows)
    if shared:
        raise DataError(
            f"{shared} prompts of the calibration split are in the fit split too, so confidences would be too high: "
            "distil again into another corpus_dir"
        )
    if config.features == "cache":
        _open_caches(config, accelerator, splits)
        for name, split in splits.items():
            split.fill_cache(config, accelerator, name)
    return splits


def _open_caches(config: FitConfig, accelerator: Accelerator, splits: dict[str, Split]) -> None:
    """Read features from disk; print the space that they need there. Raises ConfigError if less is free."""
    own = [split.open_cache(config, name).folder for name, split in splits.items()]
    rows = [row for split in splits.values() for row in split.sequences.rows]
    one = bytes_per_position(splits["fit"].extract(rows[:1]))
    needed = one * sum(len(response) for _, response in rows)
    accelerator.print(require_disk(config.features_path, needed, own=own))


def make_heads(
    config: FitConfig, layers: DecoderLayers, draft_to_target: Tensor, earlier: Adapter | None = None
) -> DraftHeads:
    """Make the heads with their initial weights, or those of an adapter."""
    exits = ExitHeads(
        config.head,
        config.exit_layers,
        hidden_size=layers.config.hidden_size,
        draft_vocab_size=len(draft_to_target),
        rank=config.head_rank,
    )
    heads = DraftHeads.of(exits, layers, draft_to_target)
    for head in exits:
        head.start(heads.unembedding)
    if earlier is not None:
        exits.load_state_dict(earlier.heads.state_dict())
    return use_peft(heads)


def run(argv: list[str]) -> None:
    """Run the command line; an error that the user can mend is one line on stderr and exit code 1."""
    quiet_logs()
    with one_line_errors():
        main(parse_config(argv))


if __name__ == "__main__":
    run(sys.argv[1:])
