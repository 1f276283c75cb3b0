"""What a LoRA does to the ids and the speed of SpecBound: a small one, trained for some steps, in and out of the base.

Plain decoding and SpecBound on the same model, as it is trained (unmerged), merged, and unmerged again; ids compared.
Quoted in docs/exactness.md. Example:
python scripts/measure/lora.py adapters/smollm2-135m-instruct configs/data/demo_prompts.jsonl --threads 2 \\
    --json lora.json
"""

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from runtime.cli.options import load_with_adapter, to_ids
from runtime.conditions import conditions
from runtime.files import write_atomic
from runtime.stats import SpeculationStats
from runtime.text.prompts import read_prompts

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
RATE = 2e-3
ANSWER = 128  # tokens


def main(
    adapter: str,
    prompts: str,
    base: Annotated[str | None, typer.Option(help="The base; by default the adapter's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens compared at each stage, at least.")] = 1000,
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Train, compare, print, keep the figures; exit code 1 if any id differs."""
    model = load_with_adapter(adapter, base, dtype=dtype, threads=threads, adaptive=False)
    texts = to_ids(model, read_prompts(prompts))
    lora: Any = get_peft_model(model, LoraConfig(**LORA))
    losses = train(lora, texts, steps)
    figures: dict[str, Any] = conditions(model.device, model.dtype) | {"lora": LORA, "steps": steps, "losses": losses}
    stages: dict[str, Any] = {"unmerged": lambda: None, "merged": lora.merge_adapter}
    stages["unmerged again"] = lora.unmerge_adapter
    figures["stages"] = {}
    for name, change in stages.items():
        change()
        figures["stages"][name] = compare(lora, model, texts, tokens, name)
    show(figures)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    if any(stage["differing"] for stage in figures["stages"].values()):
        raise typer.Exit(1)


def train(lora: Any, texts: list[torch.Tensor], steps: int) -> list[float]:
    """Teach the LoRA the prompts themselves; the losses."""
    learned = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, lr=RATE), []
    lora.train()
    for ids in tqdm(islice(cycle(texts), steps), "train", total=steps, unit="step"):
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    lora.eval()
    return losses


def compare(lora: Any, model: Any, texts: list[torch.Tensor], tokens: int, name: str) -> dict[str, Any]:
    """Tokens, how many differ, seconds of both ways, and what SpecBound did."""
    totals = {"tokens": 0, "differing": 0, "stock_seconds": 0.0, "specbound_seconds": 0.0}
    stats = SpeculationStats()
    for ids in until(texts, totals, tokens, name):
        outputs = {}
        for way in ("stock", "specbound") if totals["tokens"] % 2 else ("specbound", "stock"):
            started = time.perf_counter()
            with nullcontext() if way == "specbound" else model.specbound.disabled():
                outputs[way] = generate(lora, ids)
            totals[f"{way}_seconds"] += time.perf_counter() - started
        stats += model.specbound.stats
        longest = max(len(output) for output in outputs.values())
        same = sum(one == other for one, other in zip(outputs["stock"], outputs["specbound"], strict=False))
        totals["tokens"] += longest
        totals["differing"] += longest - same
    certificate = str(model.specbound.certificate)
    return totals | {"mean_accepted_length": round(stats.mean_accepted_length, 3), "certificate": certificate}


def until(texts: list[torch.Tensor], totals: dict[str, Any], tokens: int, name: str) -> Iterator[torch.Tensor]:
    """Texts one after another, until so many tokens were compared."""
    with tqdm(desc=name, total=tokens, unit="token") as bar:
        for ids in cycle(texts):
            yield ids
            bar.update(totals["tokens"] - bar.n)
            if totals["tokens"] >= tokens:
                return


def generate(lora: Any, ids: torch.Tensor) -> list[int]:
    """New token ids, greedy."""
    output = lora.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def show(figures: dict[str, Any]) -> None:
    """Print the stages."""
    table = Table("LoRA", "tokens", "differing", "times stock", "accepted length", box=None)
    for name, stage in figures["stages"].items():
        speedup = stage["stock_seconds"] / stage["specbound_seconds"]
        accepted = f"{stage['mean_accepted_length']:.2f}"
        table.add_row(name, str(stage["tokens"]), str(stage["differing"]), f"{speedup:.2f}", accepted)
    console = Console(highlight=False)
    console.print(f"{figures['hardware']}, {figures['dtype']}, {figures['threads']} threads, {figures['steps']} steps")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
