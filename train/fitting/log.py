"""`metrics.jsonl`: the figures of every step of a fit, kept in step with its checkpoints. Knows no heads."""

import json
from pathlib import Path
from typing import Any

from runtime.files import append, write_atomic


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with `step` and the figures of that step.

    Args:
        path: the file; lines of later steps than `step`, left by a run that was cut off, are dropped.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = "".join(f"{line}\n" for line in lines if _is_up_to(line, step))
        write_atomic(path, kept.encode())

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line, or nothing of it."""
        append(self.path, (json.dumps({"step": step, **values}) + "\n").encode())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log whose writer has ended."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _is_up_to(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):  # a line cut off by a kill
        return False
