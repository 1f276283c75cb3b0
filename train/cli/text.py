"""`specbound generate` and `specbound chat`. Slow libraries are imported when a verb needs them."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from train.cli.failure import fail

Adapter = Annotated[str, typer.Option(help="The adapter's folder, or its Hub id.")]
Model = Annotated[str | None, typer.Option(help="The base; by default the one the adapter names.")]
Sample = Annotated[bool, typer.Option("--sample", help="Sample; without it decoding is greedy.")]
Temperature = Annotated[float | None, typer.Option(min=1e-6, help="Of sampling.")]
TopP = Annotated[float | None, typer.Option(min=1e-6, max=1, help="Of sampling.")]
Seed = Annotated[int | None, typer.Option(help="torch seed; by default another each time.")]
Stop = Annotated[list[str] | None, typer.Option(help="Ends the text; may be given several times.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or float16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's own choice.")]
Exactness = Annotated[str, typer.Option(help="bitwise or batched.")]


def generate_command(
    adapter: Adapter,
    prompt: Annotated[str | None, typer.Argument(help="By default, or for -, read from stdin.")] = None,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated at most.")] = 256,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    raw: Annotated[bool, typer.Option("--raw", help="Without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    exactness: Exactness = "bitwise",
) -> None:
    """Answer a prompt; the text comes as it is generated.

    Example: specbound generate --adapter outputs/demo/adapter "Why is the sky blue?"

    Example: specbound generate --adapter outputs/demo/adapter --sample --seed 1 --json < prompt.txt
    """
    from runtime.errors import ConfigError, DataError, SpecBoundError
    from train.cli.speaker import Speaker
    from train.cli.view import TextView

    try:
        options = _sampling(sample, temperature, top_p)
        if stop and not all(stop):
            raise ConfigError("--stop is empty: give the string that ends the text, or leave it out")
        text = sys.stdin.read() if prompt in (None, "-") else prompt
        if not text:
            raise DataError("the prompt is empty: give it as an argument or on stdin")
        speaker = Speaker.load(adapter, model, dtype=dtype, threads=threads, exactness=exactness)
        ids = speaker.encode([("user", text)], raw=raw)
        ask: dict[str, Any] = {"seed": seed, "stop": stop or (), "max_new_tokens": max_new_tokens} | options
        if as_json:
            print(json.dumps(speaker.describe(ids, **ask), indent=2))
            return
        with TextView() as view:
            speaker.answer(ids, view.show, **ask)
    except (SpecBoundError, OSError) as error:
        fail(error, {"prompt": prompt} if as_json else None)


def chat_command(
    adapter: Adapter,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="A system message before the first turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    show: Annotated[bool, typer.Option("--show", help="Colour drafts by exit, and tell the speed.")] = False,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    exactness: Exactness = "bitwise",
) -> None:
    """Talk with the model: a line is a turn, /reset forgets what was said, /exit leaves.

    Example: specbound chat --adapter outputs/demo/adapter --show
    """
    from runtime.errors import SpecBoundError
    from train.cli.speaker import Speaker
    from train.cli.view import RoundsView, TextView, is_interactive

    console = Console(highlight=False)
    try:
        options = _sampling(sample, temperature, top_p) | {"seed": seed, "max_new_tokens": max_new_tokens}
        speaker = Speaker.load(adapter, model, dtype=dtype, threads=threads, exactness=exactness)
        view: Any = RoundsView(console, speaker.tokenizer, speaker.exit_layers) if show else TextView()
        if show:
            console.print(view.legend())
        _converse(speaker, view, [("system", system)] if system else [], is_interactive(), options)
    except (SpecBoundError, OSError) as error:
        fail(error, None)


def _converse(speaker: Any, view: Any, opening: list[tuple[str, str]], interactive: bool, options: Any) -> None:
    """Turns until the input ends."""
    from runtime.errors import DataError

    if interactive:
        import readline  # noqa: F401  # lines can be edited and called back
    said = list(opening)
    while (line := _next_line(interactive)) is not None and line != "/exit":
        if line == "/reset":
            said = list(opening)
        elif line.startswith("/"):
            print("error: the commands are /reset and /exit", file=sys.stderr)
        elif line:
            try:
                ids = speaker.encode([*said, ("user", line)])
            except DataError as error:  # the conversation goes on without this turn
                print(f"error: {error}", file=sys.stderr)
                continue
            with view:
                transcript, written = speaker.answer(ids, view.show, **options)
            view.summarize(written)
            said += [("user", line), ("assistant", transcript.text)]


def _next_line(interactive: bool) -> str | None:
    """What was typed, without the spaces around it; None at the end."""
    if interactive:
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _sampling(sample: bool, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Options of `generate`."""
    from runtime.errors import ConfigError

    given = {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value is not None}
    if given and not sample:
        raise ConfigError(f"{', '.join(given)} is of sampling: add --sample, or leave it out")
    return {"do_sample": sample} | given
