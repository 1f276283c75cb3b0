"""What a fit costs: tokens a second and peak memory by features, head, exits and batch; the planner beside.

Every row is a process of its own and takes a few steps of the learner on random text, since only shapes matter. The
forward that a step is compared with is the base's alone, as it gives features. Example:
python scripts/measure/fit_cost.py HuggingFaceTB/SmolLM2-135M-Instruct --threads 2 \\
    --json fit_cost.json --markdown fit_cost.md
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from runtime.conditions import hardware
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.heads import HEAD_KINDS, attends
from runtime.files import write_atomic
from train.distil import load_base
from train.features.cache import FeatureCache
from train.features.extractor import FeatureExtractor, Sequences
from train.features.prompts import PROMPT_TOKENS
from train.features.split import Split
from train.fit_exits import make_heads
from train.fitting.learner import Learner
from train.fitting.schedule import StepText
from train.fitting.throughput import peak_memory
from train.planning.hours import Devices
from train.planning.plan import GIB, estimate
from train.planning.shapes import empty_model
from train.settings.fit_config import FitConfig

CPU = torch.device("cpu")
PROMPT, RESPONSE = 64, 64  # tokens of a sequence
USUAL = {"features": "online", "head": "deep", "exits": 3, "batch": 8}
OTHERS = {"features": ["cache"], "head": [kind for kind in HEAD_KINDS if kind != "deep"], "exits": [1, 6]}
OTHERS |= {"batch": [2, 16]}
COLUMNS = {
    "features": "features", "head": "head", "exits": "exits", "batch": "batch", "tokens_per_second": "tokens/s",
    "times_forward": "step / forward", "planned_times_forward": "planned", "peak_gib": "peak GiB",
    "planned_gib": "planned GiB",
}  # fmt: skip


def main(
    base: str,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed in each row, after one that is not.")] = 2,
    dtype: str = "bfloat16",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Keep the table in this file.")] = None,
    row: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the usual fit, and it with one setting changed at a time."""
    if row is not None:
        torch.set_num_threads(threads)
        transformers_logging.disable_progress_bar()
        print(json.dumps(measure(base, dtype, json.loads(row), steps)))
        return
    rows = [USUAL] + [USUAL | {name: value} for name, values in OTHERS.items() for value in values]
    given = ["--steps", str(steps), "--dtype", dtype, "--threads", str(threads)]
    measured = [run_row(base, one, given) for one in tqdm(rows, "rows", unit="row")]
    figures = {"hardware": hardware(CPU), "threads": threads, "dtype": dtype, "prompt": PROMPT, "response": RESPONSE}
    text = table(measured)
    print(text)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures | {"steps": steps, "rows": measured}, indent=1) + "\n").encode())
    if markdown is not None:
        write_atomic(markdown, text.encode())


def run_row(base: str, row: dict[str, Any], given: list[str]) -> dict[str, Any]:
    """One row, in a process of its own, so that its peak of memory is its own."""
    command = [sys.executable, __file__, base, *given, "--row", json.dumps(row)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return row | figures


def measure(base: str, dtype: str, row: dict[str, Any], steps: int) -> dict[str, float]:
    """Seconds and memory of steps of one fit, and what the planner says of it."""
    before = peak_memory(CPU)
    shapes = empty_model(base)
    config = recipe(base, dtype, row, shapes.config)
    planned = estimate(config, shapes, Devices(1, 1e6), num_prompts=1, prompt_tokens=PROMPT)
    model, _ = load_base(config)
    layers = DecoderLayers(model.requires_grad_(False).eval())
    with tempfile.TemporaryDirectory() as folder:
        split = make_split(config, layers, row["batch"] * (steps + 1), Path(folder))
        step = make_step(config, layers, split)
        seconds = statistics.median([timed(step, number) for number in range(steps + 1)][1:])
    peak = peak_memory(CPU) - before
    texts = split.sequences.rows[: row["batch"]]
    forward = statistics.median([timed(split.extract, texts) for _ in range(steps + 1)][1:])
    return {
        "tokens_per_second": round(row["batch"] * RESPONSE / seconds, 1),
        "step_seconds": round(seconds, 4),
        "forward_seconds": round(forward, 4),
        "times_forward": round(seconds / forward, 2),
        "planned_times_forward": round(planned.times_forward - (config.features == "cache"), 2),
        "peak_gib": round(peak / GIB, 3),
        "planned_gib": round(planned.total_memory / GIB, 3),
    }


def recipe(base: str, dtype: str, row: dict[str, Any], shape: Any) -> FitConfig:
    """Exits in equal distances up to the middle of the base; all else as by default."""
    middle = shape.num_hidden_layers // 2
    return FitConfig(
        model_name_or_path=base,
        dtype=dtype,
        prompts=["-"],
        output_dir="-",
        features=row["features"],
        head=row["head"],
        exit_layers=sorted({max(1, middle * number // row["exits"]) for number in range(1, row["exits"] + 1)}),
        draft_vocab_size=min(8192, shape.vocab_size),
        per_device_train_batch_size=row["batch"],
        max_new_tokens=RESPONSE,
        max_length=PROMPT + RESPONSE,
    )


def make_split(config: FitConfig, layers: DecoderLayers, number: int, folder: Path) -> Split:
    """Random text, its features on disk where the fit reads them there."""
    ids = torch.randint(layers.config.vocab_size, (number, PROMPT + RESPONSE), generator=torch.Generator()).tolist()
    sequences = Sequences([(text[:PROMPT], text[PROMPT:]) for text in ids], 0)
    kept = PROMPT_TOKENS if attends(config.head) else 0
    extract = FeatureExtractor(layers, config.exit_layers, top_k=config.teacher_top_k, prompt_tokens=kept)
    split = Split(sequences, extract)
    if config.features == "cache":
        split.cache = FeatureCache(folder, {})
        for _ in split.cache.fill(sequences, split.extract, batch_size=config.per_device_train_batch_size):
            pass
    return split


def make_step(config: FitConfig, layers: DecoderLayers, split: Split) -> Callable[[int], object]:
    """`step(number)`: one step of the learner, on the texts of that number."""
    vocabulary, size = torch.arange(config.draft_vocab_size), config.per_device_train_batch_size
    heads = make_heads(config, layers, vocabulary)
    accelerator = Accelerator(cpu=True)
    learned = [parameter for parameter in heads.exits.parameters() if parameter.requires_grad]
    wrapped, optimizer = accelerator.prepare(heads.exits, torch.optim.AdamW(learned))
    learner = Learner(
        config, accelerator, heads.with_exits(wrapped), optimizer, split, 0, of=len(split.sequences) // size
    )

    def step(number: int) -> object:
        text = StepText([list(range(number * size, (number + 1) * size))], size * RESPONSE)
        return learner.learn(text, step=number, learning_rate=config.learning_rate)

    return step


def timed(call: Callable[[Any], object], argument: Any) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call(argument)
    return time.perf_counter() - started


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)] + [[str(row[name]) for name in COLUMNS] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    typer.run(main)
