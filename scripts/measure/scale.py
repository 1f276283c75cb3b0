"""How fast a large base would be, by parts of its real shape: two layers with random weights, measured.

Costs are those of this machine; how often drafts are right is taken from logged traces of another, smaller base, whose
exits stand at the same share of the depth. Example:
python scripts/measure/scale.py adapters/smollm2-135m-instruct lmsys/vicuna-7b-v1.5 --threads 2 --json scale.json
"""

import gc
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from runtime.adapter.folder import load_adapter
from runtime.conditions import hardware
from runtime.decoding.drafter import HeadDrafter
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.drafting.lookup import LookupTable
from runtime.drafting.policy import SpeculationBounds
from runtime.drafting.temperature import TemperatureSchedule
from runtime.files import write_atomic
from runtime.generate import attach
from runtime.handle import SpecBound
from train.calibration.traces import TRACES_FILE, Traces
from train.planning.shapes import empty_model
from train.replay.costs import CostTable
from train.replay.profile import MAX_WIDTH, measure
from train.replay.replay import Replayer
from train.replay.search import OFF, tune

LAYERS = 2  # of the part that is measured
DRAFT_VOCAB, RANK_SHARE = 8192, 0.25


def main(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter with traces.")],
    bases: Annotated[list[str], typer.Argument(help="Ids or folders; only their shapes are read.")],
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    device: str = "cpu",
    exactness: str = "bitwise",
    repeats: Annotated[int, typer.Option(min=2)] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, predict, print a table, and keep the figures."""
    transformers_logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    config = load_adapter(adapter).config
    traces = Traces.read(Path(adapter) / TRACES_FILE, weights_sha256=config.weights_sha256)
    figures: dict[str, Any] = {"hardware": hardware(torch.device(device)), "dtype": dtype, "bases": {}}
    for base in bases:
        shape = empty_model(base).config
        depth = shape.num_hidden_layers
        costs = whole(part(shape, getattr(torch, dtype), device, exactness, repeats), depth)
        at_depth = tuple(round(layer * depth / config.num_hidden_layers) for layer in traces.layers)
        figures["bases"][base] = predict(replace(traces, layers=at_depth), costs) | {"costs": asdict(costs)}
        if json_file is not None:
            write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    show(figures)


def part(shape: PretrainedConfig, dtype: torch.dtype, device: str, exactness: str, repeats: int) -> CostTable:
    """Measured costs of a model of this shape with `LAYERS` layers, and of a head on its first."""
    few = AutoConfig.for_model(**(shape.to_dict() | {"num_hidden_layers": LAYERS, "layer_types": None}))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(few, dtype=dtype).eval()
    layers, width = DecoderLayers(model), shape.hidden_size
    kept = list(range(min(DRAFT_VOCAB, shape.vocab_size)))
    heads = ExitHeads("deep", [1], hidden_size=width, draft_vocab_size=len(kept), rank=int(RANK_SHARE * width)).to(
        device, dtype
    )
    drafter = HeadDrafter(
        DraftHeads.of(heads.eval(), layers, torch.tensor(kept)),
        TemperatureSchedule.none([1]),
        LookupTable(((0.5,) * 3,) * 8),
    )
    bounds = SpeculationBounds(OFF, 1, MAX_WIDTH - 1)
    attach(model, SpecBound(model, drafter, bounds, fingerprint="random layers", exactness=exactness))
    costs = measure(model, repeats=repeats)
    del model, layers, heads, drafter
    gc.collect()
    return costs


def whole(measured: CostTable, num_hidden_layers: int) -> CostTable:
    """Costs of the whole depth: stock's layers take what its token does, less the unembedding and the choice, which
    take what ours do."""
    times = num_hidden_layers / measured.num_hidden_layers
    once = measured.unembedding[1] + measured.token
    return replace(
        measured,
        num_hidden_layers=num_hidden_layers,
        plain=once + times * max(0.0, measured.plain - once),
        plain_context=times * measured.plain_context,
    )


def predict(traces: Traces, costs: CostTable) -> dict[str, float]:
    """Speed by replay of the tuned policy, and with drafts that are never wrong."""
    replayer = Replayer(traces, costs)
    bounds, replayed = tune(traces, costs, progress=False)
    alone = replayer.run(SpeculationBounds(OFF, 0, 0))
    return {
        "stock_ms": round(alone.ms_per_token * alone.speedup, 2),
        "plain_over_stock": round(alone.speedup, 3),
        "over_stock": round(replayed.speedup, 3),
        "over_plain": round(replayed.speedup / alone.speedup, 3),
        "mean_accepted_length": round(replayed.mean_accepted_length, 3),
        "head_in_layers": round(costs.head / costs.layer[1], 2),
        "further_row_in_layers": round((costs.layer[8] - costs.layer[1]) / 7 / costs.layer[1], 4),
        "max_draft_tokens": bounds.max_draft_tokens,
        "deepest_exit": bounds.max_exit_layer,
    }


def show(figures: dict[str, Any]) -> None:
    """A row for each base."""
    console = Console(highlight=False)
    console.print(f"{figures['hardware']}, {figures['dtype']}; times stock, by replay with measured parts")
    names = [name for name in next(iter(figures["bases"].values())) if name != "costs"]
    table = Table("base", *(name.replace("_", " ") for name in names), box=None)
    for base, row in figures["bases"].items():
        table.add_row(base.rsplit("/", 1)[-1], *(str(row[name]) for name in names))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
