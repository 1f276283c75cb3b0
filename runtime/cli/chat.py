"""`specbound chat`: talk with the model, turn by turn. Slow libraries are imported when it runs."""

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from runtime.cli.failure import fail
from runtime.cli.options import (
    Adapter,
    Device,
    Dtype,
    Exactness,
    Model,
    Sample,
    Seed,
    Temperature,
    Threads,
    TopP,
    sampling,
)


def chat_command(
    adapter: Adapter,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="A system message before the first turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Give each answer this many tokens at most.")] = 512,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    show: Annotated[bool, typer.Option("--show", help="Colour drafts by their exit, and show the speed.")] = False,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    device: Device = "cpu",
    exactness: Exactness = "bitwise",
) -> None:
    """Talk with the model. A line is a turn; /reset forgets what was said, /exit leaves.

    Example: specbound chat --adapter outputs/demo/adapter --show
    """
    from runtime.cli.speaker import Speaker
    from runtime.cli.view import RoundsView, TextView, is_interactive
    from runtime.errors import SpecBoundError

    console = Console(highlight=False)
    try:
        options = sampling(sample, temperature, top_p) | {"seed": seed, "max_new_tokens": max_new_tokens}
        speaker = Speaker.load(adapter, model, dtype=dtype, threads=threads, device=device, exactness=exactness)
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
