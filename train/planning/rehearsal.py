"""`rehearse`: what a fit would do on this machine, up to its first step: its data, steps, hours, memory and disk.

One batch of answers is begun, one batch of text read by the base and learnt by new heads, to time them; nothing is
written.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import attends
from runtime.errors import DataError
from train.corpus.answers import Answerer, Turn
from train.corpus.collection import Collection
from train.corpus.options import CorpusOptions
from train.corpus.record import read_record
from train.features.disk import readable
from train.features.extractor import FeatureExtractor, Features
from train.features.prompts import PROMPT_TOKENS
from train.features.spread import is_spread
from train.fitting.learner import Learner, optimizer_for
from train.fitting.schedule import Plan, StepText
from train.planning.plan import GIB, empty_heads, position_bytes, step_memory
from train.planning.survey import Survey
from train.settings.fit_config import FitConfig

TOKENS = 16  # of each answer that is timed


def rehearse(
    config: FitConfig,
    layers: DecoderLayers,
    tokenizer: Any,
    options: CorpusOptions,
    heads: DraftHeads,
    accelerator: Accelerator,
) -> str:
    """Go as far as the first step and say what the fit takes, a line for each matter.

    All processes must call it. Answers count as `max_new_tokens` long, so hours, memory and disk are upper bounds.

    Args:
        heads: new ones, which learn a batch to see how long that takes.

    Raises:
        DataError: no prompt is short enough, or one of the splits would be empty.
    """
    keep, processes = config.answers == "keep", accelerator.num_processes
    read = Collection.mix(config.prompts, limit=config.prompt_limit, keep=keep, quiet=True)
    survey = Survey.of(read, tokenizer, options)
    turns = _batch(config, layers, tokenizer, options, read)
    rows = survey.splits.get("fit", 0)
    total = sum(survey.splits.values())
    if missing := [name for name in ("fit", "calibration", "held_out") if not survey.splits.get(name)]:
        raise DataError(f"the {' and '.join(missing)} split would be empty: give more prompts or other fractions")
    plan = Plan(config, [config.max_new_tokens] * rows, world_size=processes)
    splits = ", ".join(f"{name} {number}" for name, number in survey.splits.items())
    lines = [
        f"data        {survey.conversations} conversations, {total} turns ({splits});"
        f" {survey.duplicates} duplicates, {survey.too_long} too long",
        f"steps       {plan.total}, {plan.steps_per_epoch} an epoch; a checkpoint every {config.save_steps}",
    ]
    lines += [f"skipped     {read.reasons()}"] if read.skipped else []
    lines += [_corpus_hours(config, layers, tokenizer, options, turns, total / processes)] if not keep else []
    lines += [_fit_hours(config, layers, turns, plan, rows / processes, heads, accelerator)]
    lines += [_memory(config, layers, turns), _disk(config, layers, total)]
    return "\n".join([*lines, "dry run: nothing was written; leave --dry_run out to fit"])


def _batch(
    config: FitConfig, layers: DecoderLayers, tokenizer: Any, options: CorpusOptions, read: Collection
) -> list[Turn]:
    """The first prompts as one batch of turns."""
    answerer = Answerer(layers.model, tokenizer, options, together=is_spread(layers.model))
    first = read.prompts[: 4 * config.generation_batch_size]
    batches = answerer.batches([(prompt, prompt.messages) for prompt in first])
    if not batches:
        raise DataError("none of the first prompts is short enough: raise max_prompt_tokens")
    return max(batches, key=len)


def _corpus_hours(
    config: FitConfig, layers: DecoderLayers, tokenizer: Any, options: CorpusOptions, turns: list[Turn], number: float
) -> str:
    """Time a batch's prompts and the first tokens of its answers."""
    if config.generator is not None:
        return f"corpus      {number:.0f} answers by {config.generator}"
    if read_record(config.corpus_path).get("complete"):
        return f"corpus      complete in {config.corpus_path}"
    prompts, both = (_answer_seconds(layers, tokenizer, options, turns, tokens) for tokens in (1, TOKENS))
    token = max(both - prompts, 0.0) / (TOKENS - 1)
    seconds = prompts + token * (config.max_new_tokens - 1)
    hours = number / len(turns) * seconds / 3600
    rate = len(turns) * config.max_new_tokens / seconds
    return f"corpus      at most {_time(hours)}, {rate:.0f} tokens/s by process"


def _answer_seconds(
    layers: DecoderLayers, tokenizer: Any, options: CorpusOptions, turns: list[Turn], tokens: int
) -> float:
    answerer = Answerer(
        layers.model, tokenizer, replace(options, max_new_tokens=tokens), together=is_spread(layers.model)
    )
    return _seconds(lambda: answerer.answer(turns, name="rehearsal"), layers.device)


def _fit_hours(
    config: FitConfig,
    layers: DecoderLayers,
    turns: Sequence[Turn],
    plan: Plan,
    rows: float,
    heads: DraftHeads,
    accelerator: Accelerator,
) -> str:
    """Time the base's forward on a batch, and a step of the heads on what it read."""
    batch = [(turn.prompt_ids, [0] * config.max_new_tokens) for turn in turns[: config.per_device_train_batch_size]]
    kept = PROMPT_TOKENS if attends(config.head) else 0
    extract = FeatureExtractor(layers, config.exit_layers, top_k=config.teacher_top_k, prompt_tokens=kept)
    base = _seconds(lambda: extract(batch), layers.device)
    step = _step_seconds(config, accelerator, heads, extract(batch), plan)
    batches = config.gradient_accumulation_steps
    forwards = rows / len(batch) if config.features == "cache" else plan.total * batches
    hours = (base * forwards + step * plan.total) / 3600
    rate = len(batch) * config.max_new_tokens / (base + step / batches)
    return (
        f"fit         about {_time(hours)}, {rate:.0f} answer tokens/s by process; a batch takes the base {base:.2g} s"
        f" and the heads {step / batches:.2g} s"
    )


def _step_seconds(
    config: FitConfig, accelerator: Accelerator, heads: DraftHeads, features: Features, plan: Plan
) -> float:
    """Time a step of the heads with their optimizer, on features that are there already."""
    wrapped, optimizer = accelerator.prepare(heads.exits, optimizer_for(config, heads.exits))
    given = cast(Any, SimpleNamespace(features=lambda indices: features))
    learner = Learner(config, accelerator, heads.with_exits(wrapped), optimizer, given, 0, of=plan.num_batches)
    batches = config.gradient_accumulation_steps
    text = StepText([[0]] * batches, batches * len(features.target) * accelerator.num_processes)
    return _seconds(lambda: learner.learn(text, step=0, learning_rate=config.learning_rate), accelerator.device)


def _memory(config: FitConfig, layers: DecoderLayers, turns: Sequence[Turn]) -> str:
    """Sum up what a step holds, beside what the device has."""
    heads = empty_heads(config, layers.model)
    learned = sum(parameter.numel() for parameter in heads.parameters())
    base = sum(parameter.numel() * parameter.element_size() for parameter in layers.model.parameters())
    length = min(config.longest, max(len(turn.prompt_ids) for turn in turns) + config.max_new_tokens)
    step = step_memory(config, layers.model, heads, length=length, responses=config.max_new_tokens)
    needed = base + 16 * learned + sum(step.values())
    if layers.device.type == "cuda":
        there, where = torch.cuda.get_device_properties(layers.device).total_memory, "the GPU"
    else:
        there, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    warning = ": too much, see specbound plan" if needed > 0.95 * there else ""
    return f"memory      {needed / GIB:.1f} of {there / GIB:.1f} GiB of {where}{warning}"


def _disk(config: FitConfig, layers: DecoderLayers, answers: int) -> str:
    """Sum up checkpoints and cached features, beside what is free."""
    learned = sum(parameter.numel() for parameter in empty_heads(config, layers.model).parameters())
    kept = 12.0 * learned * (config.save_total_limit + 1)
    cache = answers * config.max_new_tokens * position_bytes(config, layers.model)
    cache = cache if config.features == "cache" else 0.0
    path = Path(config.output_dir).absolute()
    free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
    warning = ": too little is free" if kept + cache > free else ""
    features = f", cached features {readable(cache)}" if cache else ""
    return f"disk        checkpoints {readable(kept)}{features}; {readable(free)} free{warning}"


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long the second of two runs takes."""
    took = 0.0
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - start
    return took
