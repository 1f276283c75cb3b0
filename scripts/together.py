"""Many prompts: tokens a second of requests together, one after the other, and in stock's padded batches.

All in one process, in turn, several times; medians. SpecBound has its controller, which learns in the first run. Ids
are compared with stock's of each prompt alone. The time to the first token is that of the last of the requests that
arrive together. Example:
python scripts/together.py adapters/smollm2-135m-instruct configs/data/demo_prompts.jsonl --threads 2 \\
    --json together.json
"""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from runtime.batch import Batch, generated
from runtime.cli.options import load_with_adapter
from runtime.conditions import conditions
from runtime.files import write_atomic
from runtime.text.encode import encode
from runtime.text.prompts import read_prompts, spread

NEW_TOKENS = 64
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
    at_once: Annotated[list[int], typer.Option(help="Requests together; may be given several times.")] = [1, 4, 8, 16],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print, keep the figures."""
    model = load_with_adapter(adapter, None, dtype="bfloat16", threads=threads)
    model.specbound.prepare(model)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    ids: Texts = []
    for prompt in spread(read_prompts(prompts), limit):
        ids.append(encode(tokenizer, [{"role": one.role, "content": one.content} for one in prompt.messages]))
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        measure(model, tokenizer, ids, at_once, rows)
    show(rows)
    if json_file is not None:
        figures = conditions(model.device, model.dtype)
        figures |= {"prompts": len(ids), "new_tokens": NEW_TOKENS, "repeats": repeats, "rows": rows}
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())


def measure(model: Any, tokenizer: Any, ids: Texts, at_once: list[int], rows: dict[str, Any]) -> None:
    """Every way once."""
    truth = timed(rows, "stock, one by one", lambda: [alone(model, each, False) for each in ids])
    timed(rows, "SpecBound, one by one", lambda: [alone(model, each, True) for each in ids], truth)
    for number in at_once:
        timed(rows, f"stock, padded batches of {number}", partial(padded, model, tokenizer, ids, number), truth)
        for speculate, way in ((False, "plain loop"), (True, "SpecBound")):
            name = f"{way}, {number} together"
            row = rows.setdefault(name, {})
            timed(rows, name, partial(together, model, ids, number, speculate, row), truth)


def timed(rows: dict[str, Any], name: str, run: Callable[[], Texts], truth: Texts | None = None) -> Texts:
    """Run it, and keep tokens a second of each run and how many texts are stock's in all of them."""
    row = rows.setdefault(name, {})
    started = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - started
    row.setdefault("tokens_per_second", []).append(round(sum(map(len, found)) / seconds, 1))
    same = sum(a == b for a, b in zip(found, truth or found, strict=True))
    row["identical"] = min(same, row.get("identical", same))
    return found


def alone(model: Any, ids: list[int], speculate: bool) -> list[int]:
    """The ids that `generate` adds to one prompt."""
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    with nullcontext() if speculate else model.specbound.disabled():
        found = model.generate(given, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    text: list[int] = found[0, len(ids) :].tolist()
    return text


def padded(model: Any, tokenizer: Any, ids: Texts, number: int) -> Texts:
    """The same by stock's loop over padded batches; cut at the end of each text."""
    found, ends = [], model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
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


def together(model: Any, ids: Texts, number: int, speculate: bool, row: dict[str, Any]) -> Texts:
    """The same in one batch of ours."""
    with Batch(model, number) as batch:
        streams = [Moments() for _ in ids]
        calls = [
            batch.add(each, streamer=stream, speculate=speculate, max_new_tokens=NEW_TOKENS, do_sample=False)
            for each, stream in zip(ids, streams, strict=True)
        ]
        started = time.perf_counter()
        while not all(call.ended for call in calls):
            batch.round()
    last = max(stream.seen[1] for stream in streams[:number]) - started
    row.setdefault("last_first_token_seconds", []).append(round(last, 3))
    return [generated(call) for call in calls]


def show(rows: dict[str, Any]) -> None:
    """A table."""
    table = Table("", "tokens/s", "identical to stock alone", "last first token, s")
    for name, row in rows.items():
        first = row.get("last_first_token_seconds")
        speed = f"{statistics.median(row['tokens_per_second']):.1f}"
        table.add_row(name, speed, str(row["identical"]), "" if first is None else f"{statistics.median(first):.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
