"""Checkpoints of a fit: `checkpoint-<step>` folders, whole or absent, and the metrics log beside them.

Accelerate writes model, optimizer and random states; this file names, finds and prunes the folders and keeps
`metrics.jsonl` in step. Knows no heads and no data.

A checkpoint is a local file of the user's own run and never published: its optimizer and random states are
pickles. Accelerate reads them with `weights_only`, so they run no code; DeepSpeed's own are read in full.
"""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from runtime.errors import ConfigError
from train.shards import write_atomically

STATE_FILE = "fit_state.json"
PREFIX = "checkpoint-"


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, settings: dict[str, Any], *, keep: int
) -> None:
    """Write `checkpoint-<step>` and remove all but the `keep` newest; every process calls it.

    Checkpoints of later steps are removed too: they are left from before the run went back to an older one.
    """
    unfinished = output_dir / f".{PREFIX}{step}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a kill
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = json.dumps({"step": step, "settings": settings}, indent=2)
        (unfinished / STATE_FILE).write_text(state + "\n", encoding="utf-8")
        final = output_dir / f"{PREFIX}{step}"
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        found = find_checkpoints(output_dir)
        kept = [path for path in found if _step(path) <= step][-keep:]
        for old in found:
            if old not in kept:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, wanted: str | None, output_dir: Path, settings: dict[str, Any]) -> int:
    """Restore the wanted checkpoint; the step it was taken at, 0 where none is wanted or none is there yet.

    Args:
        wanted: None, `latest`, or a checkpoint folder.
        settings: what must be as it was when the checkpoint was made; JSON values.

    Raises:
        ConfigError: the folder is no whole checkpoint, or was made with other settings (which are listed).
    """
    folder = _find(wanted, output_dir)
    if folder is None:
        return 0
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        step, before = int(state["step"]), dict(state["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder} is not a whole checkpoint: name another {PREFIX}STEP folder, or latest") from None
    differing = [
        f"{key} ({before.get(key)!r} there, {settings.get(key)!r} now)"
        for key in sorted({*before, *settings})
        if before.get(key) != settings.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{folder} was made with other settings: {', '.join(differing)}; "
            "use those, or start anew in another output_dir"
        )
    try:
        accelerator.load_state(str(folder))
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        pickle.PickleError,
        SafetensorError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{folder} is damaged ({reason}): remove it, or name another checkpoint") from None
    accelerator.wait_for_everyone()
    return step


def _find(wanted: str | None, output_dir: Path) -> Path | None:
    if wanted != "latest":
        return None if wanted is None else Path(wanted)
    return next(reversed(find_checkpoints(output_dir)), None)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, by rising step."""
    found = [
        path
        for path in output_dir.glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdecimal() and (path / STATE_FILE).is_file()
    ]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with `step` and the figures of that step.

    Args:
        path: the file; lines of later steps than `step`, left by a run that was cut off, are dropped.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = "".join(f"{line}\n" for line in lines if _is_up_to(line, step))
        write_atomically(path, lambda file: file.write(kept.encode("utf-8")))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _is_up_to(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):  # a line cut off by a kill
        return False
