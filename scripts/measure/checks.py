"""What it costs to look at the model before each call: code, hooks, settings, weights, every bit of packed ones.

Beside the time of one answer. Quoted in docs/exactness.md. Example:
python scripts/measure/checks.py adapters/smollm2-135m-instruct --threads 2 --json checks.json
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tqdm import trange

from runtime.cli.options import load_with_adapter
from runtime.conditions import conditions
from runtime.exact.fingerprint import settings, structure, tensors
from runtime.files import write_atomic


def main(
    adapter: str,
    base: Annotated[str | None, typer.Option(help="The base; by default the adapter's.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print, keep the figures."""
    model = load_with_adapter(adapter, base, dtype=dtype, threads=threads)
    figures = conditions(model.device, model.dtype) | {"tokens": tokens, "repeats": repeats}
    figures |= measure(model, tokens, repeats)
    console = Console(highlight=False)
    console.print(
        f"{figures['hardware']}, {figures['dtype']}, {figures['threads']} threads, an answer of {tokens} tokens"
    )
    for name, ms in figures["ms"].items():
        console.print(f"{name:<12} {ms:9.3f} ms")
    console.print(f"all checks are {100 * figures['share']:.2f} % of the answer")
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())


@torch.no_grad()
def measure(model: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each check, of all as they are made, and of an answer; medians."""
    prepared = model.specbound.prepared
    ids = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0)).to(model.device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.specbound.prepare(model)
    parts: dict[str, Callable[[], object]] = {
        "code": lambda: structure(model),
        "settings": settings,
        "weights": lambda: tensors(model),
        "packed": lambda: prepared.packed is None or prepared.packed.current(),
        "all checks": lambda: model.specbound.prepare(model),
        "answer": lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in trange(repeats, desc="checks"):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - started)
    ms = {name: round(1000 * statistics.median(times), 4) for name, times in seconds.items()}
    return {"ms": ms, "share": ms["all checks"] / ms["answer"]}


if __name__ == "__main__":
    typer.run(main)
