"""The verbs that need no training, and how the command line starts and ends."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from runtime.cli import audit, chat, generate, inspect, serve
from runtime.files import disk_line

# Which extra brings a library, where that is not `train`.
EXTRAS = {"optuna": "sweep"} | dict.fromkeys(("fastapi", "uvicorn", "prometheus_client", "starlette"), "serve")
CLOSED_PIPE = 1  # as typer and rich end where they see it first

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("generate")(generate.generate_command)
app.command("chat")(chat.chat_command)
app.command("serve")(serve.serve_command)
app.command("inspect")(inspect.inspect_command)
app.command("audit")(audit.audit_command)


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        try:
            print(f"specbound {version('specbound')}")
        except PackageNotFoundError:  # run from a folder, not installed
            from runtime.adapter.config import VERSION

            print(f"specbound {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """SpecBound: exit heads that let a transformer draft for itself.

    Exit codes: 0 done, 1 an error or ids that differ, 2 wrong usage, 130 interrupted.
    """


def run(app: typer.Typer) -> None:
    """Run a command line. A closed pipe ends it quietly; a library that is missing is named, with its extra.

    An error of the disk that no verb has caught is one line, too.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names in any script, on any terminal
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python still flushes at its end goes nowhere
        sys.exit(CLOSED_PIPE)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "runtime", "train"):  # a mistake of ours
            raise
        extra = EXTRAS.get(library, "train")
        print(f"error: {library} is not installed: pip install 'specbound[{extra}]'", file=sys.stderr)
        sys.exit(1)
    except Exception as error:  # what writes raises errors of many kinds
        if (line := disk_line(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
