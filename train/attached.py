"""An adapter on its base, as the options of the command line say. Knows no verbs."""

from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from runtime import ConfigError, load_specbound

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def load_attached(
    adapter: str, base_model: str | None, *, dtype: str, threads: int | None, exactness: str = "bitwise"
) -> Any:
    """The model with `generate` bound, in this dtype; torch's threads are set for the whole process.

    Raises:
        SpecBoundError: wrong options, adapter or base.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    transformers_logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    return load_specbound(adapter, base_model, dtype=DTYPES[dtype], exactness=exactness)
