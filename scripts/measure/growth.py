"""How cost grows: tokens a second by length of the prompt and of the answer, memory, and time to load.

Stock, our plain loop and SpecBound in turn on the same text, ids compared. Speeds are of what follows the prompt. The
text is one that has no end: the prompts of a file, one after another. Example:
python scripts/measure/growth.py adapters/smollm2-135m-instruct configs/data/demo_prompts.jsonl --threads 2 \\
    --json growth.json
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from runtime.cli.options import load_with_adapter
from runtime.conditions import hardware
from runtime.files import write_atomic
from runtime.text.prompts import read_prompts
from train.evaluation.methods import Method, make_methods
from train.fitting.throughput import peak_memory
from train.replay.clock import Clock

METHODS = ("stock", "plain", "specbound")
CONTEXTS, OUTPUTS = (128, 512, 1024, 2048, 4096), (32, 128, 512)
FIXED_OUTPUT, FIXED_CONTEXT = 64, 128
CPU = torch.device("cpu")


def main(
    adapter: str,
    prompts: str,
    repeats: Annotated[int, typer.Option(min=1, help="Texts at each length.")] = 3,
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print, keep the figures; exit code 1 if any id differs."""
    before, started = peak_memory(CPU), time.perf_counter()
    model = load_with_adapter(adapter, None, dtype=dtype, threads=threads)
    loaded = time.perf_counter() - started
    text = "\n\n".join(message.content for prompt in read_prompts(prompts) for message in prompt.messages)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    longest = getattr(model.config, "max_position_embeddings", CONTEXTS[-1] + FIXED_OUTPUT)
    lengths = [(context, FIXED_OUTPUT) for context in CONTEXTS if context + FIXED_OUTPUT <= longest]
    lengths += [(FIXED_CONTEXT, output) for output in OUTPUTS]
    methods = make_methods(model, METHODS)
    rows = [measure(model, methods, ids, *pair, repeats) for pair in tqdm(lengths, "lengths", unit="length")]
    heads = sum(tensor.nbytes for tensor in model.specbound.drafter.heads.exits.state_dict().values())
    keys = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    figures = {
        "hardware": hardware(model.device),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "load_seconds": round(loaded, 2),
        "mebibytes": {
            "base": round(model.get_memory_footprint() / 2**20, 1),
            "heads": round(heads / 2**20, 1),
            "draft rows": round(model.specbound.drafter.heads.unembedding.weight.nbytes / 2**20, 1),
            "cache of 1,000 tokens": round(1000 * keys * model.dtype.itemsize / 2**20, 1),
            "peak of the process": round((peak_memory(CPU) - before) / 2**20, 1),
        },
        "lengths": rows,
    }
    show(figures)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    if not all(row["identical"] for row in rows):
        raise typer.Exit(1)


def measure(
    model: Any, methods: dict[str, Method], ids: torch.Tensor, context: int, output: int, repeats: int
) -> dict[str, Any]:
    """Median tokens a second after the prompt of each method, at one length of prompt and answer."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    identical, lengths = True, []
    for number in range(repeats):
        start = number * (len(ids) - context) // max(1, repeats)
        prompt = ids[start : start + context][None].to(model.device)
        outputs = []
        for name, method in methods.items():
            clock = Clock()
            options = {"max_new_tokens": output, "min_new_tokens": output, "do_sample": False, "streamer": clock}
            outputs.append(method.generate(model, prompt, attention_mask=torch.ones_like(prompt), **options))
            seconds[name].append((clock.times[-1] - clock.times[1]) / (output - 1))
            if name == "specbound":
                lengths.append(model.specbound.stats.mean_accepted_length)
        identical = identical and all(torch.equal(one, outputs[0]) for one in outputs)
    return {
        "context": context,
        "output": output,
        "identical": identical,
        "mean_accepted_length": round(statistics.median(lengths), 3),
        "tokens_per_second": {name: round(1 / statistics.median(taken), 2) for name, taken in seconds.items()},
    }


def show(figures: dict[str, Any]) -> None:
    """A table of speeds and a line of memory."""
    table = Table("prompt", "answer", *METHODS, "accepted length", "identical", box=None)
    for row in figures["lengths"]:
        speeds = [f"{row['tokens_per_second'][name]:.1f}" for name in METHODS]
        length = f"{row['mean_accepted_length']:.2f}"
        table.add_row(str(row["context"]), str(row["output"]), *speeds, length, str(row["identical"]))
    console = Console(highlight=False)
    console.print(table)
    sizes = ", ".join(f"{name} {size:.0f} MiB" for name, size in figures["mebibytes"].items())
    console.print(f"{sizes}; loaded and probed in {figures['load_seconds']:.1f} s")


if __name__ == "__main__":
    typer.run(main)
