"""Our own kernels beside torch: products of a prompt's many rows, and a draft of a `deep` head.

Medians, in turn in one process. Quoted in docs/benchmark.md. Example:
python scripts/measure/native.py adapters/smollm2-135m-instruct --threads 2 --json native.json
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional

from runtime.cli.options import load_with_adapter
from runtime.conditions import conditions
from runtime.drafting.heads import HeadContext
from runtime.exact.native.layout import layout_of
from runtime.exact.native.library import why_not_native
from runtime.files import write_atomic


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    base: Annotated[str | None, typer.Option(help="The base; by default the adapter's.")] = None,
    rows: Annotated[list[int], typer.Option(help="Tokens of a prompt; may be given several times.")] = [60, 800],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 9,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print, keep the figures; milliseconds."""
    if (reason := why_not_native()) is not None:
        raise typer.BadParameter(f"there are no native kernels here: {reason}")
    model = load_with_adapter(adapter, base, dtype="bfloat16", threads=threads)
    model.specbound.prepare(model)
    figures = conditions(model.device, model.dtype)
    with torch.inference_mode():
        figures |= {"prompt": {number: prompt(model, number, repeats) for number in rows}}
        if not model.specbound.drafter.heads.attends:
            figures |= {"draft": draft(model.specbound.drafter.heads, 20 * repeats)}
    print(json.dumps(figures, indent=1))
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())


def prompt(model: Any, rows: int, repeats: int) -> dict[str, float]:
    """The stock forward of a prompt, and the products of its layers by torch and by our kernel."""
    ids = torch.randint(model.config.vocab_size, (1, rows))
    calls: dict[str, Callable[[], Any]] = {"forward": lambda: model(ids, use_cache=True, logits_to_keep=1)}
    inputs, unembedding = {}, model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not unembedding]
    layouts = {module.weight.shape: layout_of(module, module.out_features) for module in linears}
    runs = [layouts[module.weight.shape].runner(module) for module in linears]
    for module in linears:
        inputs[module.in_features] = torch.randn(1, rows, module.in_features).bfloat16()

    def by_torch() -> None:
        for module in linears:
            functional.linear(inputs[module.in_features], module.weight)

    def by_kernel() -> None:
        for module, run in zip(linears, runs, strict=True):
            run(inputs[module.in_features])

    return timed(calls | {"products by torch": by_torch, "products by our kernel": by_kernel}, repeats)


def draft(heads: Any, repeats: int) -> dict[str, float]:
    """A draft of the shallowest head, as modules and in our kernel."""
    size = heads.exits.one.hidden_size
    states = torch.randn(3, 1, size).bfloat16()
    context, layer = HeadContext(states[1], states[2], torch.tensor([1])), heads.exit_layers[0]
    ways = {"as modules": replace(heads, native={}), "in our kernel": heads}
    return timed(
        {name: lambda way=way: way.best(layer, states[0], context, 1.0, 1) for name, way in ways.items()}, repeats
    )


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(taken[1:]), 3) for name, taken in times.items()}


if __name__ == "__main__":
    typer.run(main)
