"""How the command line ends with an error: one line, exit code 1."""

import json
import sys
from typing import Any, NoReturn

import typer

from runtime.errors import one_line


def fail(error: Exception, as_json: dict[str, Any] | None) -> NoReturn:
    """End with exit code 1: one line on stderr, or these fields and the error as JSON on stdout."""
    if isinstance(error, BrokenPipeError):
        raise error
    if as_json is None:
        print(f"error: {one_line(error)}", file=sys.stderr)
    else:
        print(json.dumps(as_json | {"error": one_line(error)}, indent=2))
    raise typer.Exit(1)
