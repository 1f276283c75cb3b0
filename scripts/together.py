"""Many prompts: tokens a second of requests together and one after the other, and of stock's ways with many.

All in one process, in turn, several times; medians. SpecBound has its controller, which learns in the first run.
Stock's ways are padded batches and its `generate_batch`, on a copy of the model without SpecBound. Ids are compared
with stock's of each prompt alone. The first token is that of the last of the requests that arrive together. Rows a
second are those of all rounds over all seconds, prompts included; beside them, those of 16 rows alone. Example:
python scripts/together.py adapters/smollm2-135m-instruct configs/data/demo_prompts.jsonl --threads 2 \\
    --json together.json
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from runtime import SpeculationBounds
from runtime.batch import Batch, generated
from runtime.cli.options import load_with_adapter
from runtime.conditions import conditions
from runtime.decoding.families import CACHE
from runtime.errors import one_line
from runtime.files import write_atomic
from runtime.stats import SpeculationStats
from runtime.text.encode import encode
from runtime.text.prompts import read_prompts, spread
from runtime.text.transcript import ends_of

NEW_TOKENS = 64
BLOCK, CONTEXT, BLOCKS = 16, 96, 12  # rows of the block that is timed alone, tokens before it, times in a run
PAGE, STOCK_ROWS = 32, 256  # of stock's `generate_batch`: tokens of a page, and of a pass
FIGURES = ("tokens_per_second", "first_token_seconds", "rows_per_second", "rows_per_second_of_rounds")
Texts = list[list[int]]


@dataclass
class Moments(BaseStreamer):
    """When each call of a streamer came."""

    seen: list[float] = field(default_factory=list)

    def put(self, value: Any) -> None:
        """Told the prompt, then each token."""
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more."""


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    prompts: Annotated[str, typer.Argument(help="A file of prompts.")],
    limit: Annotated[int, typer.Option(min=1, help="Prompts, at even distances.")] = 16,
    at_once: Annotated[list[int], typer.Option(help="Requests together; may be given several times.")] = [4, 8, 16],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print, keep the figures."""
    model = load_with_adapter(adapter, None, dtype="bfloat16", threads=threads)
    model.specbound.prepare(model)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    stock = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=model.dtype).eval()
    ids: Texts = []
    for prompt in spread(read_prompts(prompts), limit):
        ids.append(encode(tokenizer, [{"role": one.role, "content": one.content} for one in prompt.messages]))
    rows: dict[str, dict[str, Any]] = {}
    block: list[float] = []
    for _ in range(repeats):
        measure(model, stock, tokenizer, ids, at_once, rows)
        block.append(round(block_rows(model), 1))
    show(rows, block)
    if json_file is not None:
        figures = conditions(model.device, model.dtype) | {"prompts": len(ids), "new_tokens": NEW_TOKENS}
        alone = {"rows": BLOCK, "context": CONTEXT, "rows_per_second": block}
        figures |= {"repeats": repeats, "rows": rows, "block_alone": alone}
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())


def measure(model: Any, stock: Any, tokenizer: Any, ids: Texts, at_once: list[int], rows: dict[str, Any]) -> None:
    """Every way once."""
    own, truth = model.specbound.bounds, Texts()
    plain = replace(own, max_draft_tokens=0)
    for name, bounds in (("stock", None), ("plain loop", plain), ("SpecBound", own)):
        name = f"{name}, one by one"
        found = timed(rows, name, partial(one_by_one, model, ids, bounds, rows.setdefault(name, {})), truth)
        truth = truth or found
    for number in at_once:
        timed(rows, f"stock, padded batches of {number}", partial(padded, model, tokenizer, ids, number), truth)
        name = f"stock, generate_batch, {number} together"
        try:
            continuous(stock, ids, number, rows.setdefault(name, {}), truth)
        except Exception as error:  # it is not made for CPUs
            rows[name]["note"] = one_line(error)
        for speculate, way in ((False, "plain loop"), (True, "SpecBound")):
            name = f"{way}, {number} together"
            row = rows.setdefault(name, {})
            timed(rows, name, partial(together, model, ids, number, speculate, row), truth)


def timed(rows: dict[str, Any], name: str, run: Callable[[], Texts], truth: Texts | None = None) -> Texts:
    """Run it, and keep what it came to."""
    row = rows.setdefault(name, {})
    started = time.perf_counter()
    found = run()
    keep(row, found, time.perf_counter() - started, truth or found)
    return found


def keep(row: dict[str, Any], found: Texts, seconds: float, truth: Texts) -> None:
    """Tokens and rows a second of each run, and how many texts are stock's in all of them."""
    row.setdefault("tokens_per_second", []).append(round(sum(map(len, found)) / seconds, 1))
    if "rows" in row:
        row.setdefault("rows_per_second", []).append(round(row.pop("rows") / seconds, 1))
    same = sum(a == b for a, b in zip(found, truth, strict=True))
    row["identical"] = min(same, row.get("identical", same))


def one_by_one(model: Any, ids: Texts, bounds: SpeculationBounds | None, row: dict[str, Any]) -> Texts:
    """The ids that `generate` adds to each prompt, by stock's own loop where there are no bounds."""
    specbound, texts, firsts = model.specbound, [], []
    with specbound.disabled() if bounds is None else specbound.using(bounds=bounds):
        for each in ids:
            given, moments, started = torch.tensor([each]), Moments(), time.perf_counter()
            options = {"attention_mask": torch.ones_like(given), "max_new_tokens": NEW_TOKENS, "do_sample": False}
            texts.append(model.generate(given, streamer=moments, **options)[0, len(each) :].tolist())
            firsts.append(moments.seen[1] - started)
            if bounds is not None:
                row["rows"] = row.get("rows", 0) + rows_of(specbound.stats)
    row.setdefault("first_token_seconds", []).append(round(statistics.median(firsts), 3))
    return texts


def rows_of(stats: SpeculationStats) -> int:
    """Rows that were multiplied for a call's rounds."""
    return stats.rounds + stats.drafted.total()


def padded(model: Any, tokenizer: Any, ids: Texts, number: int) -> Texts:
    """The same by stock's loop over padded batches; cut at the end of each text."""
    found, ends = [], ends_of(model)
    for first in range(0, len(ids), number):
        part = ids[first : first + number]
        width = max(map(len, part))
        given = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in part])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part])
        with model.specbound.disabled():
            out = model.generate(given, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[:, width:]
        for row in out.tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            found.append(row[: stop + 1])
    return found


def continuous(stock: Any, ids: Texts, number: int, row: dict[str, Any], truth: Texts) -> None:
    """The same by what stock's `generate_batch` does, once its cache is there: making that is not timed."""
    pages = sum(-(-(len(each) + NEW_TOKENS) // PAGE) for each in sorted(ids, key=len)[-number:])
    config = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=pages + number, max_batch_tokens=STOCK_ROWS, max_requests_per_batch=number,
        use_cuda_graph=False, auto_switch_to_flash=False,
    )  # fmt: skip
    generation = GenerationConfig.from_dict(stock.generation_config.to_dict() | {"do_sample": False})
    with stock.continuous_batching_context_manager(
        generation, continuous_batching_config=config, warmup=False, timeout=60
    ) as manager:
        started = time.perf_counter()
        names = manager.add_requests(ids, max_new_tokens=NEW_TOKENS, record_timestamps=True)
        found: dict[str, Any] = {}
        while len(found) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.error:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            elif result is None and not manager.is_running():
                raise RuntimeError("its thread ended")
        seconds = time.perf_counter() - started
    keep(row, [found[name].generated_tokens for name in names], seconds, truth)
    last = sorted(each.timestamps[0] for each in found.values())[number - 1]  # it serves them in another order
    row.setdefault("first_token_seconds", []).append(round(last - started, 3))


def together(model: Any, ids: Texts, number: int, speculate: bool, row: dict[str, Any]) -> Texts:
    """The same in one batch of ours."""
    started = time.perf_counter()
    with Batch(model, number) as batch:
        streams = [Moments() for _ in ids]
        calls = [
            batch.add(each, streamer=stream, speculate=speculate, max_new_tokens=NEW_TOKENS, do_sample=False)
            for each, stream in zip(ids, streams, strict=True)
        ]
        while not all(call.ended for call in calls):
            batch.round()
    last = max(stream.seen[1] for stream in streams[:number]) - started
    stats = [call.stats for call in calls if call.stats is not None]
    row["rows"], seconds = sum(map(rows_of, stats)), sum(each.parts.total() - each.parts["prompt"] for each in stats)
    row.setdefault("rows_per_second_of_rounds", []).append(round(row["rows"] / max(seconds, 1e-9), 1))
    row.setdefault("first_token_seconds", []).append(round(last, 3))
    return [generated(call) for call in calls]


@torch.inference_mode()
def block_rows(model: Any) -> float:
    """Rows a second where the model does nothing but multiply one block after the other; of the median time."""
    prepared, cache = model.specbound.prepared, DynamicCache(config=model.config)
    ids = torch.randint(model.config.vocab_size, (1, CONTEXT + BLOCK), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids[:, :CONTEXT], use_cache=True, logits_to_keep=1, **{CACHE: cache})
    layers, kv, seconds = prepared.layers, prepared.cache_of(cache, CONTEXT + BLOCK), list[float]()
    with prepared.running(model):
        for _ in range(BLOCKS):
            started = time.perf_counter()
            hidden = layers.embed(ids[:, CONTEXT:], CONTEXT)
            layers.logits(layers.run(hidden, 0, layers.num_layers, CONTEXT, kv))
            seconds.append(time.perf_counter() - started)
            kv.crop(CONTEXT)
    return BLOCK / statistics.median(seconds[2:])


def show(rows: dict[str, Any], block: list[float]) -> None:
    """A table."""
    one, best = statistics.median(rows["SpecBound, one by one"]["first_token_seconds"]), statistics.median(block)
    table = Table("", "tokens/s", "identical", "last first token, s", "times one alone", "rows/s", "in rounds")
    for name, row in rows.items():
        speed, last, *multiplied = (statistics.median(row[key]) if key in row else None for key in FIGURES)
        if speed is None:
            table.add_row(name, "", row["note"])
            continue
        first = ["", ""] if last is None else [f"{last:.2f}", f"{last / one:.2f}"]
        more = [f"{each:.0f}" if each else "" for each in multiplied]
        table.add_row(name, f"{speed:.1f}", str(row["identical"]), *first, *more)
    Console(width=130).print(table)
    print(f"a block of {BLOCK} rows alone: {best:.0f} rows a second")


if __name__ == "__main__":
    typer.run(main)
