"""Entry point: make the corpus of a recipe, the base's own answers to its prompts.

Run it as `accelerate launch train/distil.py --config configs/fit/NAME.yaml`. After a stop, the same command continues.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from runtime.adapter.identity import base_fingerprint
from runtime.base import base_config, find_base, load_model, load_tokenizer
from runtime.decoding.layers import settle_kernels
from runtime.errors import AdapterError, ConfigError
from runtime.files import naming
from train.corpus.answers import check_template
from train.corpus.collection import Collection
from train.corpus.corpus import distil
from train.corpus.options import CorpusOptions
from train.features.spread import is_spread, load_spread, whole_parameters
from train.fitting.interrupts import StopSignals
from train.fitting.launch import one_line_errors
from train.settings.fit_config import FitConfig, parse_config, validate

logger = logging.getLogger(__name__)


def make_corpus(config: FitConfig, model: Any, tokenizer: Any, *, state: PartialState) -> Path:
    """Make the corpus of the recipe on all processes, or finish or reuse an earlier one; returns its folder.

    Args:
        config: a validated recipe.
        model: the base, on this process's device.

    Raises:
        ConfigError, DataError: see `Collection.mix` and `distil`.
    """
    check_template(tokenizer, CorpusOptions.of(config))  # before anything that takes long
    if state.is_main_process and (longest := config.max_prompt_tokens + config.max_new_tokens) > config.longest:
        logger.warning(
            "max_length %d cuts answers that are generated whole: set it to max_prompt_tokens + max_new_tokens, %d, or"
            " leave it out; or lower max_prompt_tokens to %d",
            config.longest,
            longest,
            max(1, config.longest - config.max_new_tokens),
        )
    with state.main_process_first():  # the other processes then read data sets from the cache
        keep, quiet = config.answers == "keep", not state.is_main_process
        read = Collection.mix(config.prompts, limit=config.prompt_limit, keep=keep, quiet=quiet)
    return distil(
        model,
        tokenizer,
        read.prompts,
        config.corpus_path,
        CorpusOptions.of(config),
        fingerprint=base_fingerprint(model, whole_parameters(model)),
        rank=state.process_index,
        world_size=state.num_processes,
        barrier=state.wait_for_everyone,
        generator=config.generator,
        given=read.conversations if keep else None,
        skipped=read.skipped,
        together=is_spread(model),
    )


def require_prompts(config: FitConfig) -> None:
    """Before the base is loaded: raise DataError where a file of the recipe is not there or holds nothing of use."""
    Collection.require(config.prompts, limit=config.prompt_limit, keep=config.answers == "keep")
    Collection.require(config.evaluation_files)


def load_base(config: FitConfig, spread: str | None = None) -> tuple[Any, Any]:
    """Load the base of the recipe and its tokenizer: on the CPU, or sharded over the devices of the processes.

    Args:
        spread: how to shard the base, see `train.features.spread`; None loads it whole on the CPU.

    Raises:
        ConfigError: the base cannot be loaded.
        UnsupportedModel: the base's layers cannot be driven one by one.
    """
    settle_kernels()
    name, options = find_base(config.model_name_or_path), {"revision": config.model_revision}
    dtype = getattr(torch, config.dtype)
    try:
        if spread is None:
            return load_model(name, options, dtype=dtype), load_tokenizer(name, options)
        base_config(name, options)
        return load_spread(spread, name, dtype=dtype, **options), load_tokenizer(name, options)
    except AdapterError as error:
        raise ConfigError(f"model_name_or_path {config.model_name_or_path!r}: {error}") from error


def main(config: FitConfig) -> None:
    """Load the base of the recipe and make the corpus.

    Raises:
        ConfigError: a wrong setting, or a base that cannot be loaded.
        DataError: prompts that cannot be used.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM; what is answered so far stays.
    """
    validate(config)
    require_prompts(config)
    state = PartialState()
    with StopSignals(), naming(config.corpus_path):
        model, tokenizer = load_base(config)
        folder = make_corpus(config, model.to(state.device), tokenizer, state=state)
    if state.is_main_process:
        logger.info("corpus complete: %s", folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_line_errors():
        main(parse_config(sys.argv[1:]))
