"""An adapter on its base, and prompts for it, as the options of the command line say. Knows no verbs."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from runtime import ConfigError, DataError, load_specbound
from train.corpus.prompts import Prompt, read_prompts

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def load_attached(
    adapter: str,
    base_model: str | None,
    *,
    dtype: str,
    threads: int | None,
    exactness: str = "bitwise",
    adaptive: bool = True,
) -> Any:
    """The model with `generate` bound, in this dtype; torch's threads are set for the whole process.

    Args:
        adaptive: as `load_specbound` takes it; False where speculation itself is what is looked at.

    Raises:
        SpecBoundError: wrong options, adapter or base.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    transformers_logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    return load_specbound(adapter, base_model, dtype=DTYPES[dtype], exactness=exactness, adaptive=adaptive)


def read_spread(prompts: str, limit: int | None) -> list[Prompt]:
    """Prompts of a file or data set.

    Args:
        limit: this many, spread evenly over the file; None for all.

    Raises:
        DataError: they cannot be read.
    """
    return spread(read_prompts(prompts), limit)


def to_ids(model: Any, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
    """Token ids [1, T] of each prompt's first turn, on the model's device.

    Raises:
        DataError: nothing is left of one.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    return [encode(tokenizer, prompt).to(model.device) for prompt in prompts]


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """`limit` of the prompts at even distances, so that a file sorted by subject is seen whole."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def encode(tokenizer: Any, prompt: Prompt) -> torch.Tensor:
    """Token ids [1, T] of a prompt's first turn, through the chat template where there is one.

    Raises:
        DataError: nothing is left of it.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer("\n".join(message.content for message in prompt.messages))["input_ids"]
    else:
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise DataError("a prompt has no tokens: remove it from the file")
    return torch.tensor([ids])
