"""Whether each of many requests to a server has the answer that stock `generate` gives it alone.

Requests of all kinds (`questions.py`: greedy and seeded, stop strings, penalties, biases, JSON of a schema, several
answers, probabilities, clients that leave) are answered by a copy of the model without SpecBound in this process, and
then by `specbound serve`, at each number of requests at once, in random order. Ids where they are streamed, texts,
reasons and probabilities must be equal to the last bit. With --spoil one Linear of the copy adds in another order:
that must be found. Exit code 1 where it is not as it should be. Example:
python scripts/load/identity.py adapters/smollm2-135m-instruct --threads 2 --json identity.json
"""

import json
import random
import shlex
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from oracle import Oracle, spoil
from questions import BOUND_KIND, STOPPED, Question, make_questions
from rich.console import Console
from rich.table import Table
from servers import get, serving
from tqdm import tqdm
from transformers.utils import logging as transformers_logging
from visitors import ask, differences

from runtime.adapter.folder import load_adapter
from runtime.adapter.hub import resolve_adapter
from runtime.base import find_base, load_model, load_tokenizer
from runtime.conditions import conditions
from runtime.files import write_atomic
from runtime.text.prompts import read_prompts, spread
from runtime.text.transcript import ends_of

START = "from runtime.cli.app import app, run; run(app)"
COUNTED = ("rounds", "drafted_tokens", "accepted_tokens", "prefix_cache_hits", "requests")  # of the server's metrics
KEPT = 20  # differences that are told in full


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    model: Annotated[str | None, typer.Option(help="The base, if not the one the adapter names.")] = None,
    prompts: Annotated[str, typer.Option(help="A file of prompts.")] = "configs/data/demo_prompts.jsonl",
    limit: Annotated[int, typer.Option(min=1, help="Prompts, at even distances.")] = 64,
    tokens: Annotated[int, typer.Option(min=4, help="Of an answer, at most.")] = 40,
    at_once: Annotated[list[int], typer.Option(help="Requests at once; may be given several times.")] = [1, 3, 8, 16],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of kinds and order.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the base.")] = "bfloat16",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    spoiled: Annotated[bool, typer.Option("--spoil", help="Negative control.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the report in this file.")] = None,
) -> None:
    """Ask stock, then the server; print and keep what differs."""
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    base = find_base(model or load_adapter(resolve_adapter(adapter)).config.base_model_name_or_path)
    stock: Any = load_model(base, {}, dtype=getattr(torch, dtype)).eval()
    texts = [prompt.messages[-1].content for prompt in spread(read_prompts(prompts), limit)]
    report: dict[str, Any] = conditions(stock.device, stock.dtype) | {"tokens": tokens, "seed": seed}
    if spoiled:
        report["spoiled"] = spoil(stock)
    oracle = Oracle(stock, load_tokenizer(base, {}))
    questions, report["left_out"] = asked(oracle, texts, tokens, seed)
    command = [sys.executable, "-c", START, "serve", "--adapter", adapter, "--dtype", dtype, "--threads", str(threads)]
    command += ["--max-running", str(max(at_once)), "--max-waiting", "64", *(["--model", model] if model else [])]
    with serving(f"{shlex.join(command)} --port {{port}}") as url:
        report |= {"certificate": get(f"{url}/health")["certificate"]} | compared(url, questions, at_once, seed)
    show(report)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(report, indent=1) + "\n").encode())
    raise typer.Exit(bool(report["differing"]) != spoiled)


def asked(oracle: Oracle, texts: Sequence[str], tokens: int, seed: int) -> tuple[list[Question], list[str]]:
    """Questions with stock's answers, and kinds that cannot be asked here."""
    chats, without = oracle.tokenizer.chat_template is not None, list[str]()
    try:
        import llguidance  # noqa: F401
    except ImportError:
        without = [BOUND_KIND]
    if not chats or not ends_of(oracle.model):
        without = [BOUND_KIND]
    vocabulary = int(oracle.model.config.get_text_config().vocab_size)
    questions = make_questions(texts, tokens=tokens, vocabulary=vocabulary, chats=chats, without=without, seed=seed)
    among = random.Random(seed + 1)
    for question in tqdm(questions, "stock alone"):
        question.expected = oracle.answer(question)
        if question.kind == STOPPED:
            question.body["stop"] = question.stop_within(among)
            oracle.cut(question.expected[0], question.body["stop"])
    return questions, without


def compared(url: str, questions: Sequence[Question], at_once: Sequence[int], seed: int) -> dict[str, Any]:
    """The server's answers beside stock's, at each number of requests at once."""
    name = get(f"{url}/v1/models")["data"][0]["id"]
    report: dict[str, Any] = {"requests": len(questions), "differing": 0, "at_once": {}, "differences": []}
    for number in at_once:
        order = random.Random(f"{seed} {number}").sample(range(len(questions)), len(questions))
        delays = random.Random(number)

        def visit(index: int, name: str = name, delays: random.Random = delays) -> list[str]:
            time.sleep(delays.random() / 10)
            question = questions[index]
            try:
                return differences(question, *ask(url, name, question))
            except Exception as error:  # lost
                return [f"no answer: {type(error).__name__}: {error}"]

        started = time.perf_counter()
        with ThreadPoolExecutor(number) as pool:
            found = list(tqdm(pool.map(visit, order), f"{number} at once", len(order)))
        all_kinds, same = Counter[str](), Counter[str]()
        for index, wrong in zip(order, found, strict=True):
            all_kinds.update(questions[index].traits)
            same.update([] if wrong else questions[index].traits)
            if wrong and len(report["differences"]) < KEPT:
                kept = {"at_once": number, "number": index, "kind": questions[index].kind, "what": wrong}
                report["differences"].append(kept | {"body": questions[index].body})
        wrong_ones = sum(map(bool, found))
        report["differing"] += wrong_ones
        report["at_once"][str(number)] = {
            "differing": wrong_ones,
            "seconds": round(time.perf_counter() - started, 1),
            "same_of_all": {trait: [same[trait], count] for trait, count in all_kinds.items()},
        }
    return report | {"server": counts(url)}


def counts(url: str) -> dict[str, float]:
    """What the server counted of rounds, drafts and the memory of prompts: that there were any."""
    page = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
    pairs = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    totals = Counter[str]()
    for name, _, value in pairs:
        plain = name.removeprefix("specbound_")
        key = plain if plain.startswith("requests_total") else plain.partition("{")[0]
        if key.startswith(COUNTED) and not key.endswith("_created"):
            totals[key] += float(value)  # type: ignore[assignment]
    return dict(totals)


def show(report: dict[str, Any]) -> None:
    """A table: equal answers of all, by kind and number at once."""
    table = Table("equal to stock alone", *(f"{number} at once" for number in report["at_once"]))
    runs = list(report["at_once"].values())
    for trait in sorted({trait for run in runs for trait in run["same_of_all"]}):
        table.add_row(trait, *("{} of {}".format(*run["same_of_all"][trait]) for run in runs))
    console = Console(width=120, highlight=False)
    console.print(table)
    for each in report["differences"][:5]:
        console.print(f"{each['at_once']} at once, {each['kind']}: {each['what'][0]:.300}", markup=False)
    console.print(f"{report['differing']} answers differ")


if __name__ == "__main__":
    typer.run(main)
