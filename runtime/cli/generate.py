"""`specbound generate`: answer one prompt, or a file of them. Slow libraries are imported when it runs."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli.failure import fail
from runtime.cli.options import (
    Adapter,
    Device,
    Dtype,
    Exactness,
    Model,
    Sample,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopP,
    sampling,
)


def generate_command(
    adapter: Adapter,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. Without it, or with -, it is read from stdin.")
    ] = None,
    file: Annotated[str | None, typer.Option(help="Answer each prompt of this .jsonl or .json file instead.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Answers to the file's prompts; those that it holds are not made again.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts of the file that are answered at once.")] = 8,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate this many tokens at most.")] = 256,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave out the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    device: Device = "cpu",
    exactness: Exactness = "bitwise",
) -> None:
    """Answer a prompt. The text comes as it is generated.

    Example: specbound generate --adapter outputs/demo/adapter "Why is the sky blue?"

    Example: specbound generate --adapter outputs/demo/adapter --sample --seed 1 --json < prompt.txt

    Example: specbound generate --adapter outputs/demo/adapter --file prompts.jsonl --output answers.jsonl
    """
    from runtime.cli.answers import Asked, answer_file
    from runtime.cli.speaker import Speaker
    from runtime.errors import ConfigError, SpecBoundError

    try:
        options = sampling(sample, temperature, top_p)
        if stop and not all(stop):
            raise ConfigError("--stop is empty: give the string that ends the text, or leave it out")
        if (file is None) != (output is None) or (file is not None and (prompt is not None or as_json)):
            raise ConfigError("--file goes with --output FILE.jsonl, and with no prompt and no --json")
        text = _text(prompt) if file is None else ""
        asked = None if file is None or output is None else Asked.read(file, output)
        speaker = Speaker.load(adapter, model, dtype=dtype, threads=threads, device=device, exactness=exactness)
        ask: dict[str, Any] = {"seed": seed, "stop": stop or (), "max_new_tokens": max_new_tokens} | options
        if asked is not None:
            answer_file(speaker, asked, concurrency=concurrency, raw=raw, **ask)
        else:
            _answer(speaker, text, raw, as_json, **ask)
    except (SpecBoundError, OSError) as error:
        fail(error, {"prompt": prompt} if as_json else None)


def _text(prompt: str | None) -> str:
    """The prompt, from the argument or stdin."""
    from runtime.errors import DataError

    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text:
        raise DataError("the prompt is empty: give it as an argument or on stdin")
    return text


def _answer(speaker: Any, text: str, raw: bool, as_json: bool, **ask: Any) -> None:
    """Answer one prompt, as the text comes or as one JSON object."""
    from runtime.cli.view import TextView

    ids = speaker.encode([("user", text)], raw=raw)
    if as_json:
        print(json.dumps(speaker.describe(ids, **ask), indent=2))
        return
    with TextView() as view:
        speaker.answer(ids, view.show, **ask)
