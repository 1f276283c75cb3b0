"""What options that several verbs share say, and the model that they load. Knows no verb."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from runtime.errors import ConfigError

DTYPES = ("bfloat16", "float32", "float16")


Adapter = Annotated[str, typer.Option(help="The adapter's folder, or its Hub id.")]
Model = Annotated[
    str | None, typer.Option(help="The base's folder or Hub id. By default the one that the adapter names.")
]
Sample = Annotated[bool, typer.Option("--sample", help="Sample the tokens. Without it decoding is greedy.")]
Temperature = Annotated[float | None, typer.Option(min=1e-6, help="Temperature of sampling.")]
TopP = Annotated[
    float | None,
    typer.Option(min=1e-6, max=1, help="Sample from the likeliest tokens that together have this probability."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of torch. By default another one each time.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the text at this string. May be given several times.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the base: bfloat16, float32 or float16.")]
Device = Annotated[str, typer.Option(help="Where the base runs: cpu, cuda, cuda:1, ..., or auto.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of CPU threads. By default torch chooses.")]
Exactness = Annotated[str, typer.Option(help="How exact the tokens must be: bitwise or batched.")]


def load_with_adapter(
    adapter: str,
    base_model: str | None,
    *,
    dtype: str,
    threads: int | None,
    device: str = "cpu",
    exactness: str = "bitwise",
    adaptive: bool = True,
) -> Any:
    """The model with `generate` bound, in this dtype; torch's threads are set for the whole process.

    Args:
        device: as `device_map` of `from_pretrained`.
        adaptive: as `load_specbound` takes it; False where speculation itself is what is looked at.

    Raises:
        SpecBoundError: wrong options, adapter or base.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    import torch
    from transformers.utils import logging as transformers_logging

    from runtime import load_specbound

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if threads is not None:
        torch.set_num_threads(threads)
    return load_specbound(
        adapter,
        base_model,
        dtype=getattr(torch, dtype),
        device_map=None if device == "cpu" else device,  # which needs accelerate
        exactness=exactness,
        adaptive=adaptive,
    )


def to_ids(model: Any, prompts: Sequence[Any]) -> list[Any]:
    """Token ids [1, T] of each prompt's first turn, on the model's device.

    Raises:
        DataError: nothing is left of one.
    """
    import torch

    from runtime.base import load_tokenizer
    from runtime.errors import DataError
    from runtime.text.encode import encode

    tokenizer, tensors = load_tokenizer(model.name_or_path, {}), []
    for prompt in prompts:
        ids = encode(tokenizer, [asdict(message) for message in prompt.messages])
        if not ids:
            raise DataError("a prompt has no tokens: remove it from the file")
        tensors.append(torch.tensor([ids], device=model.device))
    return tensors


def sampling(sample: bool, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Options of `generate`.

    Raises:
        ConfigError: an option of sampling without `--sample`.
    """
    given = {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value is not None}
    if given and not sample:
        raise ConfigError(f"{', '.join(given)} is of sampling: add --sample, or leave it out")
    return {"do_sample": sample} | given
