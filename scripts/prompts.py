"""Prompts: time of the model's own forward and of ours by length; turns of a chat with a memory and without; pieces.

Keys, values and logits are compared bit for bit, ids with those of plain `generate`. The chat begins with a document;
its turns are the prompts of a file, each after the base's own answers. Last, how many positions of a prompt have other
keys or values where stock reads it in two pieces: why beginnings are taken from memory in whole blocks alone. Example:
python scripts/prompts.py adapters/smollm2-135m-instruct configs/data/demo_prompts.jsonl --threads 2 \\
    --json prompts.json
"""

import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer

from runtime.batch import Batch, generated
from runtime.batch.memory import KVMemory
from runtime.cli.options import load_with_adapter
from runtime.conditions import conditions
from runtime.decoding.families import CACHE
from runtime.files import write_atomic
from runtime.text.encode import encode
from runtime.text.prompts import read_prompts

CASES = [(100, 32), (100, 64), (200, 128), (600, 256), (600, 512), (900, 512), (900, 768), (1200, 1024)]
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 1500)
REPEATS, TURNS, ANSWER, DOCUMENT = 7, 10, 48, 700  # runs, turns, and tokens


class First(BaseStreamer):
    """When the first token came."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        """Told the prompt, then each token."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing more."""


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    prompts: Annotated[str, typer.Argument(help="A file of prompts.")],
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print, keep the figures; exit code 1 if any bit or id differs."""
    model = load_with_adapter(adapter, None, dtype="bfloat16", threads=threads)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    texts = [message.content for prompt in read_prompts(prompts) for message in prompt.messages]
    ids = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    longest = max(LENGTHS)
    ids = torch.tensor([(ids * (1 + longest // len(ids)))[:longest]])
    lengths = [by_length(model, ids[:, :length]) for length in tqdm(LENGTHS, "lengths")]
    document = tokenizer.decode(ids[0, :DOCUMENT])
    turns = chat(model, tokenizer, [f"{document}\n\n{texts[0]}", *texts[1:TURNS]])
    with model.specbound.disabled():
        pieces = [in_pieces(model, *case) for case in tqdm(CASES, "cuts")]
    for rows in (lengths, turns, pieces):
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table)
    if json_file is not None:
        figures = conditions(model.device, model.dtype) | {"lengths": lengths, "turns": turns, "pieces": pieces}
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    raise typer.Exit(not all(row["identical"] for row in (*lengths, *turns)))


@torch.inference_mode()
def by_length(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Milliseconds of a prompt's forward in the model's own layers and in ours, in turn; medians."""
    prepared = model.specbound.prepared
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    left: dict[str, list[torch.Tensor]] = {}
    for _ in range(REPEATS + 1):  # the first is not counted: the order of additions of this length is found in it
        for way, reading in (("stock", nullcontext), ("ours", prepared.reading)):
            cache = DynamicCache(config=model.config)
            started = time.perf_counter()
            with reading():
                logits = model(input_ids=ids, logits_to_keep=1, **{CACHE: cache}).logits
            seconds[way].append(time.perf_counter() - started)
            layers: list[Any] = cache.layers
            left[way] = [logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]
    stock, ours = (1000 * statistics.median(times[1:]) for times in seconds.values())
    same = all(map(torch.equal, left["stock"], left["ours"]))
    rounded = {"stock ms": round(stock, 1), "ours ms": round(ours, 1), "times": round(stock / ours, 2)}
    return {"tokens": ids.shape[1], **rounded, "identical": same}


@torch.inference_mode()
def in_pieces(model: Any, length: int, cut: int) -> dict[str, Any]:
    """Positions with other keys or values in any layer, where stock reads a random prompt in two pieces."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
    whole, pieces = rows(model, [ids]), rows(model, [ids[:, :cut], ids[:, cut:]])
    other = (whole != pieces).any(0).any(-1)
    before, after = int(other[:cut].sum()), int(other[cut:].sum())
    words = {"other before the cut": f"{before} of {cut}", "other after it": f"{after} of {length - cut}"}
    return {"prompt": length, "cut at": cut, **words}


def rows(model: Any, pieces: list[torch.Tensor]) -> torch.Tensor:
    """Keys and values of all layers, shape [layers, T, numbers], after forwards of these pieces."""
    cache = DynamicCache(config=model.config)
    for piece in pieces:
        model(input_ids=piece, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    both = [torch.cat([layer.keys, layer.values], 1)[0] for layer in cache.layers]
    return torch.stack([heads.transpose(0, 1).flatten(1) for heads in both])


def chat(model: Any, tokenizer: Any, questions: list[str]) -> list[dict[str, Any]]:
    """Each turn of a chat: tokens of its prompt, of those the ones taken from memory, seconds to the first token."""
    messages, rows, memory = list[dict[str, str]](), [], KVMemory.of(model)
    for number, question in enumerate(tqdm(questions, "turns"), start=1):
        messages.append({"role": "user", "content": question})
        ids = encode(tokenizer, messages)
        given = torch.tensor([ids])
        with model.specbound.disabled():
            stock = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=ANSWER, do_sample=False
            )[0, len(ids) :].tolist()
        without, _, others = first_token(model, ids, KVMemory.of(model))
        seconds, taken, answer = first_token(model, ids, memory)
        row = {"turn": number, "tokens": len(ids), "taken": taken, "seconds": seconds, "without a memory": without}
        rows.append(row | {"identical": answer == others == stock})
        messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
    return rows


def first_token(model: Any, ids: list[int], memory: KVMemory) -> tuple[float, int, list[int]]:
    """Seconds to the first token of an answer, tokens that were taken from the memory, and the answer."""
    moment, started = First(), time.perf_counter()
    with Batch(model, 1, memory) as batch:
        call = batch.add(ids, streamer=moment, max_new_tokens=ANSWER, do_sample=False)
        while not call.ended:
            batch.round()
    return round(moment.at - started, 3), model.specbound.stats.reused, generated(call)


if __name__ == "__main__":
    typer.run(main)
