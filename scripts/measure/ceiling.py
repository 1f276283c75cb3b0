"""Where a token's time goes, before and after, and how far that is from what the machine could do.

Two bounds: every weight read once a token at the memory's own speed, and a round whose drafts are never wrong.
Example: python scripts/measure/ceiling.py adapters/smollm2-135m-instruct --threads 2 --json ceiling.json
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from tqdm import trange
from transformers import DynamicCache

from runtime.cli.options import load_with_adapter
from runtime.conditions import hardware
from runtime.decoding.cache import KVCache
from runtime.decoding.families import CACHE
from runtime.drafting.policy import SpeculationBounds
from runtime.files import write_atomic
from train.calibration.traces import TRACES_FILE, Traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer
from train.replay.search import OFF, WIDTHS

PRODUCTS = ("mm", "addmm", "_linear_pointwise", "mkldnn_linear")
READ_BYTES = 2**28
TOKENS = 64


def main(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter with traces and costs.")],
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens before the one that is timed.")] = 256,
    repeats: Annotated[int, typer.Option(min=3)] = 25,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure on the CPU, print, keep the figures."""
    model = load_with_adapter(adapter, None, dtype=dtype, threads=threads)
    figures = {
        "hardware": hardware(model.device),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "context": context,
        **split(model, context, repeats),
        "bounds": bounds(model, Path(adapter)),
    }
    show(figures)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())


@torch.no_grad()
def split(model: Any, context: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of one token's forward, by kind of operation: stock's, and our loop's."""
    specbound = model.specbound
    layers = specbound.prepared.layers
    specbound.prepare(model)
    ids = torch.randint(model.config.vocab_size, (1, context + 1), generator=torch.Generator().manual_seed(0))
    stock = DynamicCache()
    model(input_ids=ids[:, :context], use_cache=True, **{CACHE: stock})
    cache = KVCache.from_dynamic(stock, context + 1)

    def before() -> None:
        model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: stock})
        stock.crop(-1)

    def after() -> None:
        with specbound.prepared.running(model), torch.inference_mode():
            for _ in range(TOKENS):  # a call makes the model ready once
                hidden = layers.embed(ids[:, -1:], context)
                layers.logits(layers.run(hidden, 0, layers.num_layers, context, cache))
                cache.crop(context)

    ways = {"stock": before, "plain": after}
    tokens = {"stock": 1, "plain": TOKENS}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in trange(repeats + 3, desc="forwards"):
        for name, call in ways.items():
            started = time.perf_counter()
            call()
            if number >= 3:  # the first pay for allocations
                seconds[name].append((time.perf_counter() - started) / tokens[name])
    return {name: kinds(call, 1000 * statistics.median(seconds[name])) for name, call in ways.items()}


def kinds(call: Callable[[], None], whole: float, times: int = 10) -> dict[str, float]:
    """Milliseconds of a token in products with weights, in attention, and in all the rest: shares of `whole`, as in a
    profile, which is taken in another minute. Attention in our own kernel is in the rest. The whole alone where layers
    are one native call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(times):
            call()
    events = profiled.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key.split("::")[-1] in PRODUCTS)
    attention = sum(event.cpu_time_total for event in events if event.key == "aten::scaled_dot_product_attention")
    if not products:
        return {"whole": round(whole, 2)}
    total = sum(event.self_cpu_time_total for event in events)
    products, attention = whole * products / total, whole * attention / total
    return {
        "whole": round(whole, 2),
        "products": round(products, 2),
        "attention": round(attention, 2),
        "rest": round(whole - products - attention, 2),
    }


def bounds(model: Any, adapter: Path) -> dict[str, float]:
    """Tokens a second that the memory allows, and those of drafts that are never wrong, by replay."""
    block = torch.zeros(READ_BYTES // 4)
    taken = []
    for _ in range(15):
        started = time.perf_counter()
        block.sum()
        taken.append(time.perf_counter() - started)
    bandwidth = READ_BYTES / statistics.median(taken)
    decoder = model.get_decoder().layers
    read = sum(weight.nbytes for weight in decoder.parameters()) + model.get_output_embeddings().weight.nbytes
    specbound = model.specbound
    costs = CostTable.read(adapter / "costs.json")
    traces = Traces.read(adapter / TRACES_FILE, weights_sha256=specbound.config.weights_sha256)
    right = np.zeros_like(traces.rank)
    never_wrong = replace(traces, confidence=np.ones_like(traces.confidence), rank=right, shared=right)
    rates = [Replayer(never_wrong, costs).run(SpeculationBounds(0.5, 0, width)).tokens_per_second for width in WIDTHS]
    tuned = Replayer(traces, costs).run(specbound.bounds)
    alone = Replayer(traces, costs).run(SpeculationBounds(OFF, 0, 0))
    return {
        "memory_gb_per_second": round(bandwidth / 1e9, 1),
        "weights_mib": round(read / 2**20, 1),
        "weights_once_a_token": round(bandwidth / read, 1),
        "weights_once_a_round": round(bandwidth / read * tuned.mean_accepted_length, 1),
        "plain": round(alone.tokens_per_second, 1),
        "specbound": round(tuned.tokens_per_second, 1),
        "never_wrong": round(max(rates), 1),
    }


def show(figures: dict[str, Any]) -> None:
    """Print both tables."""
    console = Console(highlight=False)
    console.print(
        f"{figures['hardware']}, {figures['dtype']}, {figures['threads']} threads, context {figures['context']}"
    )
    table = Table("ms a token", *figures["stock"], box=None)
    for name in ("stock", "plain"):
        table.add_row(name, *(f"{value:.1f}" for value in figures[name].values()))
    console.print(table)
    for name, value in figures["bounds"].items():
        console.print(f"{name.replace('_', ' ')}: {value}")


if __name__ == "__main__":
    typer.run(main)
