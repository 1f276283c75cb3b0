"""How the command line ends with an error: one line, exit code 1."""

import json
import sys
from typing import Any, NoReturn

import typer


def fail(error: Exception, as_json: dict[str, Any] | None) -> NoReturn:
    """End with exit code 1: one line on stderr, or these fields and the error as JSON on stdout."""
    if as_json is None:
        print(f"error: {one_line(error)}", file=sys.stderr)
    else:
        print(json.dumps(as_json | {"error": one_line(error)}, indent=2))
    raise typer.Exit(1)


def one_line(message: object) -> str:
    """The message with its breaks and runs of spaces as single spaces."""
    return " ".join(str(message).split())
