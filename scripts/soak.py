"""A server under many requests: whole, streamed, read slowly, left, bad ones; SIGTERM at the end.

Starts `specbound serve` on a free port of this machine and talks to it through sockets. Stop strings, penalties and
probabilities are asked for with a quarter of the prompts each. Each prompt is first decoded plainly, alone: what is
answered later must have those ids. Exit code 1 if anything is wrong. Example:
python scripts/soak.py adapters/smollm2-135m-instruct --requests 2000 --concurrency 8 --json soak.json
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from soak_clients import Question, Soak

from runtime.conditions import conditions
from runtime.files import write_atomic

NAME = "soaked"
LONG = 100  # tokens of the streams that run when the server is told to stop
GROWTH = 1.1, 32 << 20  # of memory between a quarter of the requests and their end: factor, and bytes beside it


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    model: Annotated[str | None, typer.Option(help="The base, if not the one the adapter names.")] = None,
    requests: Annotated[int, typer.Option(min=4)] = 2000,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of prompts and clients.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the base.")] = "bfloat16",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Run all requests, print what came of them."""
    arguments = [
        "--adapter",
        adapter,
        "--dtype",
        dtype,
        "--threads",
        str(threads),
        "--max-running",
        str(concurrency),
        "--grace",
        "600",
    ]
    arguments += ["--model", model] if model else []
    with serving(arguments) as (process, port):
        soak = Soak(port, NAME, process.pid, seed)
        questions = soak.questions()
        before, started = soak.metrics(), time.perf_counter()
        soak.counts.clear()
        memory = soak.run(questions, requests, concurrency)
        seconds = time.perf_counter() - started
        outcomes = soak.compare_counts(before)
        stop(soak, questions, process, concurrency)
    if None not in memory:
        first, last = memory
        soak.check(last < first * GROWTH[0] + GROWTH[1], f"memory grew from {first} to {last} bytes")
    figures = conditions(torch.device("cpu")) | {"dtype": dtype, "threads": threads, "concurrency": concurrency}
    figures |= {"requests": requests, "requests_per_second": round(requests / seconds, 2), "outcomes": outcomes}
    figures |= {"resident_bytes": memory, "counts": dict(sorted(soak.counts.items())), "faults": soak.faults}
    print(json.dumps(figures, indent=1))
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    if soak.counts["wrong"]:
        raise typer.Exit(1)


@contextmanager
def serving(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The server's process and port, once it is ready; it is killed if it is still there afterwards."""
    start = "from runtime.cli.app import app, run; run(app)"
    command = [sys.executable, "-c", start, "serve", "--port", "0", "--served-model-name", NAME, *arguments]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    assert process.stderr is not None
    try:
        port = 0
        for line in process.stderr:
            if line.startswith("serving "):
                port = int(line.split(",")[0].rpartition(":")[2])
            elif line.startswith("ready: "):
                break
            else:
                print(line, end="", file=sys.stderr)
        if process.poll() is not None:
            raise typer.Exit(1)
        # A pipe that nobody reads would hold the server up.
        threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True).start()
        yield process, port
    finally:
        process.kill()
        process.wait()


def stop(soak: Soak, questions: list[Question], process: subprocess.Popen[str], concurrency: int) -> None:
    """SIGTERM while streams run: they are finished with their ids, and the process ends by itself."""
    long: dict[str, Any] = {"max_tokens": LONG, "stop": None}
    asked = [question.body | long for question in questions[:concurrency]]
    alone = [soak.read_stream(body | {"specbound": {"enabled": False}}) for body in asked]
    begun: set[int] = set()
    with ThreadPoolExecutor(concurrency) as pool:
        running = [
            pool.submit(soak.read_stream, body, partial(begun.add, number)) for number, body in enumerate(asked)
        ]
        while len(begun) < len(asked) and not all(each.done() for each in running):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for each, expected in zip(running, alone, strict=True):
            soak.check(each.exception() is None and each.result() == expected, "a stream was not finished on SIGTERM")
    soak.check(process.wait(60) == 0, f"exit code {process.returncode} on SIGTERM")


if __name__ == "__main__":
    typer.run(main)
