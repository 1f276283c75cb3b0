"""Where speculation cannot pay: random strings, languages in turn, heads of noise. Tokens a second against our own
plain loop and stock.

The controller should rest, so the ratio to the plain loop should stay near 1, and ids are compared. Example:
python scripts/measure/adversarial.py outputs/demo/adapter --threads 2
"""

import copy
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from transformers import AutoTokenizer

from runtime.cli.options import load_with_adapter
from runtime.conditions import hardware
from runtime.drafting.controller import Controller
from runtime.drafting.draft_heads import DraftHeads
from runtime.files import write_atomic
from train.replay.search import OFF

SENTENCES = (
    "The river was high that spring.",
    "Der Fluss stand hoch in jenem Fruehling.",
    "La riviere etait haute ce printemps.",
    "El rio estaba crecido aquella primavera.",
    "Il fiume era alto quella primavera.",
)
KINDS = ("random strings", "languages in turn", "heads of noise")


def main(
    adapter: str,
    prompts: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print, keep the figures; exit code 1 if any id differs."""
    model = load_with_adapter(adapter, None, dtype=dtype, threads=threads)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    drafter = model.specbound.drafter
    figures: dict[str, Any] = {"hardware": hardware(model.device), "threads": torch.get_num_threads(), "dtype": dtype}
    for kind in KINDS:
        model.specbound.controller = Controller()
        noisy = kind == "heads of noise"
        model.specbound.drafter = replace(drafter, heads=noise(drafter.heads), lookup=None) if noisy else drafter
        ratios, over_plain, identical, rested = [], [], 0, 0
        for text in tqdm(list(texts(kind, prompts)), desc=kind, unit="prompt"):
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
            stock, plain, ours, same = compare(model, ids, max_new_tokens, sample=noisy)
            ratios.append(stock / ours)
            over_plain.append(plain / ours)
            identical += same
            rested += model.specbound.stats.resting_rounds
        figures[kind] = {
            "speedup_over_plain": round(statistics.median(over_plain), 4),
            "lowest_over_plain": round(min(over_plain), 4),
            "speedup_over_stock": round(statistics.median(ratios), 4),
            "identical_prompts": identical,
            "prompts": prompts,
            "resting_rounds": rested,
        }
        print(f"{kind}: {figures[kind]}")
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    if any(figures[kind]["identical_prompts"] != prompts for kind in KINDS):
        raise typer.Exit(1)


def texts(kind: str, number: int) -> Iterator[str]:
    """Prompts of one kind, the same every time."""
    numbers = random.Random(0)
    for _ in range(number):
        if kind == "random strings":
            yield "".join(chr(numbers.randrange(33, 127)) for _ in range(200))
        else:
            yield " ".join(numbers.choice(SENTENCES) for _ in range(12))


def noise(heads: DraftHeads) -> DraftHeads:
    """The same heads with random weights."""
    noisy = copy.deepcopy(heads.exits)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        random_weights = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data.copy_(random_weights.to(parameter.dtype))
    return heads.with_exits(noisy)


def compare(model: Any, ids: torch.Tensor, max_new_tokens: int, *, sample: bool) -> tuple[float, float, float, bool]:
    """Seconds of stock, of the loop without drafts and of SpecBound, and whether the ids are the same."""
    options = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "do_sample": sample}
    specbound = model.specbound
    idle = replace(specbound.bounds, exit_threshold=OFF, exit_thresholds={})
    ways = {
        "stock": specbound.disabled(),
        "plain": specbound.using(bounds=idle, controller=None),
        "ours": nullcontext(),
    }
    outputs, seconds = [], []
    for way in ways.values():
        torch.manual_seed(0)
        started = time.perf_counter()
        with way:
            outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
        seconds.append(time.perf_counter() - started)
    same = all(torch.equal(output, outputs[0]) for output in outputs)
    return seconds[0], seconds[1], seconds[2], same


if __name__ == "__main__":
    typer.run(main)
