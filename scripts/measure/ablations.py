"""What each part of the policy is worth, by run: the same prompts with it and without, beside what replay predicts.

Every variant in turn on each prompt, in one process. Example:
python scripts/measure/ablations.py outputs/demo/adapter configs/data/demo_prompts.jsonl --limit 8 --costs costs.json
"""

import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from runtime.cli.options import load_with_adapter, to_ids
from runtime.conditions import hardware
from runtime.drafting.temperature import TemperatureSchedule
from runtime.files import write_atomic
from runtime.stats import SpeculationStats
from runtime.text.prompts import read_prompts, spread
from train.calibration.traces import TRACES_FILE, Traces
from train.replay.costs import CostTable
from train.replay.variants import UNCALIBRATED, ablate, variants


def main(
    adapter: Path,
    prompts: str,
    costs: Annotated[Path, typer.Option(help="What `specbound profile` measured.")],
    limit: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print a table, keep the figures; exit code 1 if any id differs."""
    chosen = spread(read_prompts(prompts), limit)
    model = load_with_adapter(str(adapter), None, dtype=dtype, threads=threads, adaptive=False)
    figures = measure(model, to_ids(model, chosen), max_new_tokens)
    traces = Traces.read(adapter / TRACES_FILE, weights_sha256=model.specbound.config.weights_sha256)
    replayed = ablate(traces, model.specbound.bounds, CostTable.read(costs))
    for name, one in figures["variants"].items():
        one["replayed"] = replayed[name]
    show(figures)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    if not figures["identical"]:
        raise typer.Exit(1)


def measure(model: Any, prompts: list[torch.Tensor], max_new_tokens: int) -> dict[str, Any]:
    """Stock and every variant on each prompt; ratios are medians over prompts."""
    specbound = model.specbound
    chosen, calibrated = specbound.bounds, specbound.drafter
    plain = replace(calibrated, temperatures=TemperatureSchedule.none(list(specbound.config.exit_layers)))
    ratios: dict[str, list[float]] = defaultdict(list)
    stats: dict[str, SpeculationStats] = defaultdict(SpeculationStats)
    identical = True
    options = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "do_sample": False}
    for prompt in tqdm(prompts, desc="ablations", unit="prompt"):
        with specbound.disabled():
            stock, stock_seconds = timed(model, prompt, options)
        for name, bounds in variants(chosen, calibrated.exit_layers).items():
            specbound.bounds = bounds
            specbound.drafter = plain if name == UNCALIBRATED else calibrated
            output, seconds = timed(model, prompt, options)
            identical = identical and torch.equal(output, stock)
            ratios[name].append(stock_seconds / seconds)
            stats[name] += specbound.stats
        specbound.bounds, specbound.drafter = chosen, calibrated
    return {
        "hardware": hardware(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": len(prompts),
        "tokens": len(prompts) * max_new_tokens,
        "identical": identical,
        "variants": {
            name: {
                "speedup": round(statistics.median(ratios[name]), 4),
                "mean_accepted_length": round(stats[name].mean_accepted_length, 4),
                "acceptance_rate": round(stats[name].acceptance_rate, 4),
            }
            for name in ratios
        },
    }


def timed(model: Any, prompt: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Output and seconds."""
    started = time.perf_counter()
    output = model.generate(prompt, **options)
    return output, time.perf_counter() - started


def show(figures: dict[str, Any]) -> None:
    """The table, replay's figures in brackets: on its own text, so lengths differ where texts do."""
    table = Table("variant", "speed-up over stock", "mean accepted length", "acceptance rate", box=None)
    for name, one in figures["variants"].items():
        replayed = one["replayed"]
        table.add_row(
            name,
            f"{one['speedup']:.2f}x ({replayed['predicted_speedup']:.2f}x)",
            f"{one['mean_accepted_length']:.2f} ({replayed['mean_accepted_length']:.2f})",
            f"{one['acceptance_rate']:.2f} ({replayed['acceptance_rate']:.2f})",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{figures['tokens']} tokens, ids {'identical' if figures['identical'] else 'DIFFERENT'}")


if __name__ == "__main__":
    typer.run(main)
