"""`specbound plan`: estimate the memory, disk and hours of a fit before it is run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli.failure import fail


def plan_command(
    model: Annotated[str, typer.Option(help="A base (Hub id or folder) or a recipe (.yaml).")],
    gpus: Annotated[str, typer.Option(help="Number of devices and memory of each in GiB, such as 8x80.")],
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts in the corpus.")] = 100_000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Mean number of tokens of a prompt.")] = 200,
    tflops: Annotated[
        float, typer.Option(min=0.001, help="Peak bfloat16 TFLOP/s of one device. By default an A100's.")
    ] = 312.0,
    bandwidth: Annotated[
        float, typer.Option(min=0.001, help="Memory bandwidth of one device in GB/s. By default an A100's.")
    ] = 2000.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate what a fit needs: parameters, memory per device, disk and hours. Downloads at most a config.

    Example: specbound plan --model configs/fit/llama-3.1-8b.yaml --gpus 8x80
    """
    from runtime.errors import SpecBoundError
    from train.planning.hours import Devices
    from train.planning.plan import estimate, recipe_for
    from train.planning.shapes import empty_model

    try:
        devices = Devices.parse(gpus, tflops=tflops, bandwidth=bandwidth)
        config = recipe_for(model)
        base = empty_model(config.model_name_or_path, revision=config.model_revision)
        plan = estimate(recipe_for(model, base), base, devices, num_prompts=prompts, prompt_tokens=prompt_tokens)
    except SpecBoundError as error:
        fail(error, None)
    if as_json:
        print(json.dumps(asdict(plan) | {"total_memory": plan.total_memory}, indent=2))
    else:
        print("\n".join(show(plan, devices, Path(model).name, num_prompts=prompts)))


def show(plan: Any, devices: Any, name: str, *, num_prompts: int) -> list[str]:
    """Format the estimate as lines of text."""
    from train.features.disk import readable

    gib = {what: size / 2**30 for what, size in plan.memory.items()}
    spread = "decoder layers spread over all" if plan.sharded else "whole on each"
    idle = plan.active_parameters < plan.base_parameters
    active = f", {plan.active_parameters:,} of them for a token of text" if idle else ""
    lines = [
        f"{name} on {devices.number} x {devices.memory_gib:g} GiB",
        f"parameters  base {plan.base_parameters:,} ({spread}){active}, heads {plan.head_parameters:,}",
        f"memory      {plan.total_memory / 2**30:.1f} of {devices.memory_gib:g} GiB on each device: "
        + ", ".join(f"{what} {size:.1f}" for what, size in gib.items()),
        f"disk        checkpoint {readable(plan.checkpoint)}"
        + (f", cached features {readable(plan.cache)}" if plan.cache else ""),
        f"corpus      {num_prompts:,} prompts, at most {plan.tokens:,} answer tokens: {plan.corpus_hours:.1f} h"
        + (f", {plan.generation / 2**30:.1f} GiB" if plan.generation else ", by a --generator"),
        f"fit         {plan.fit_hours:.1f} h; {plan.times_forward:.2f} times the base's forward",
        f"hours assume {devices.utilisation:.0%} of {devices.tflops:g} TFLOP/s and {devices.bandwidth:g} GB/s each",
    ]
    return lines
