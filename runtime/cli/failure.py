"""How the command line ends with an error: one line, exit code 1."""

import json
import sys
from typing import Any, NoReturn

import typer

from runtime.errors import one_line
from runtime.files import disk_line


def fail(error: Exception, as_json: dict[str, Any] | None) -> NoReturn:
    """End with exit code 1: one line on stderr, or these fields and the error as JSON on stdout."""
    if isinstance(error, BrokenPipeError):
        raise error
    line = disk_line(error) or one_line(error)
    if as_json is None:
        print(f"error: {line}", file=sys.stderr)
    else:
        print(json.dumps(as_json | {"error": line}, indent=2))
    raise typer.Exit(1)
