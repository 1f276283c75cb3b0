"""Checkpoints of a fit: `checkpoint-<step>` folders, whole or absent, and the metrics log beside them.

Accelerate writes model, optimizer, schedule and random states; this file names, finds and prunes the folders and
keeps `metrics.jsonl` in step. Knows no heads and no data.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from runtime.errors import ConfigError

STATE_FILE = "fit_state.json"


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, settings: dict[str, Any], *, keep: int) -> None:
    """Write `checkpoint-<step>` and remove all but the `keep` newest; every process calls it."""
    unfinished = output_dir / f".checkpoint-{step}"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / STATE_FILE).write_text(json.dumps({"step": step, "settings": settings}), encoding="utf-8")
        final = output_dir / f"checkpoint-{step}"
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for old in find_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, wanted: str | None, output_dir: Path, settings: dict[str, Any]) -> int:
    """Restore the wanted checkpoint; the step it was taken at, 0 where none is wanted or none is there yet.

    Args:
        wanted: None, `latest`, or a checkpoint folder.

    Raises:
        ConfigError: the folder is no checkpoint, or was made with other settings (which are listed).
    """
    if wanted is None:
        return 0
    if wanted == "latest":
        found = find_checkpoints(output_dir)
        if not found:
            return 0
        folder = found[-1]
    else:
        folder = Path(wanted)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        step, before = int(state["step"]), dict(state["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder} is not a whole checkpoint: name another, or 'latest'") from None
    differing = [f"{key} (was {before.get(key)!r})" for key in settings if before.get(key) != settings[key]]
    if differing:
        raise ConfigError(f"{folder} was made with other settings: {', '.join(differing)}; use those or start anew")
    accelerator.load_state(str(folder))
    accelerator.wait_for_everyone()
    return step


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with `step`.

    Args:
        path: the file; lines of later steps than `step`, left by a run that was cut off, are dropped.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = []
        if step and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:  # a line cut off by a kill
                    continue
        path.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
