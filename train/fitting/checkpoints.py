"""Checkpoints of a fit: `checkpoint-<step>` folders; incomplete ones are skipped. Knows no heads and no data.

Accelerate writes model, optimizer and random states. A checkpoint takes its name last, and holds size and hash of
each of its files. It is of the user's own run and never published: some of its files are pickles. Accelerate reads
them with `weights_only`, so they run no code; DeepSpeed's own are read in full.
"""

import json
import logging
import os
import pickle
import shutil
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors import SafetensorError

from runtime.adapter.identity import file_sha256
from runtime.errors import ConfigError, one_line
from runtime.files import write_atomic

logger = logging.getLogger(__name__)

STATE_FILE = "fit_state.json"
PREFIX = "checkpoint-"


@dataclass(frozen=True, slots=True)
class FitState:
    """What a checkpoint holds besides weights, optimizer and random states.

    Attributes:
        step: steps done.
        skipped: batches left out so far because their loss was not finite.
        start, mean, low, norm, risen: what `Divergence` keeps.
        score: predicted speed-up by replay of held-out text, by layer counts, where it was measured at this step.
        best: the highest score up to this step.
        waited: evaluations since the best.
    """

    step: int = 0
    skipped: int = 0
    start: float | None = None
    mean: float | None = None
    low: float | None = None
    norm: float | None = None
    risen: int = 0
    score: float | None = None
    best: float | None = None
    waited: int = 0


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, state: FitState, settings: dict[str, Any], *, keep: int
) -> None:
    """Write `checkpoint-<step>`, then remove all but the best and the newest; every process calls it.

    Of the `keep` that stay, one is the newest and one the best by score; both always stay.
    Checkpoints of later steps are removed: they are left from before the run went back to an older one.

    Raises:
        ConfigError: a process could not write; all raise the same, and nothing of the checkpoint is left.
    """
    unfinished = output_dir / f".{PREFIX}{state.step}"
    if accelerator.is_main_process:
        for left in output_dir.glob(f".{PREFIX}*"):  # by a kill
            shutil.rmtree(left)
    accelerator.wait_for_everyone()

    def finish() -> None:
        if accelerator.is_main_process:
            _finish(unfinished, output_dir / f"{PREFIX}{state.step}", asdict(state) | {"settings": settings})
            _prune(output_dir, state.step, keep=keep)

    failure = _failure(accelerator, lambda: accelerator.save_state(str(unfinished)), output_dir)
    failure = failure or _failure(accelerator, finish, output_dir)
    if failure:
        shutil.rmtree(unfinished, ignore_errors=True)  # it would keep the disk full
        raise ConfigError(
            f"{PREFIX}{state.step} cannot be written in {output_dir} ({failure}): make room, and go on with"
            " --resume_from_checkpoint latest; older checkpoints are as they were"
        )


def _failure(accelerator: Accelerator, write: Callable[[], object], folder: Path) -> str | None:
    """Write, on every process; the first reason why one of them could not, the same on all, or None."""
    reason = None
    try:
        write()
    except (OSError, SafetensorError, RuntimeError) as error:
        # Torch's file writer raises RuntimeErrors, in words that differ with what was cut off.
        inner = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, RuntimeError) and inner != torch.serialization.__file__:
            raise
        reason = f"{getattr(error, 'strerror', None) or one_line(error)}; {shutil.disk_usage(folder).free} bytes free"
    if reason and accelerator.distributed_type == DistributedType.DEEPSPEED:
        return reason  # its saving waits for all by itself: they cannot be asked from outside
    return next(filter(None, gather_object([reason])), None)


def _finish(unfinished: Path, final: Path, record: dict[str, Any]) -> None:
    """Record the files, flush them to disk, and give the folder its name."""
    paths = sorted(path for path in unfinished.rglob("*") if path.is_file())
    record["files"] = {path.relative_to(unfinished).as_posix(): _seal(path) for path in paths}
    write_atomic(unfinished / STATE_FILE, (json.dumps(record, indent=2) + "\n").encode())
    _remove(final)
    unfinished.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file to disk; its size in bytes and its sha256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _remove(folder: Path) -> None:
    """Remove a checkpoint: its name first, so that an interrupted removal leaves no part of it under that name."""
    if folder.exists():
        nameless = folder.with_name(f".{folder.name}-removed")
        shutil.rmtree(nameless, ignore_errors=True)
        folder.rename(nameless)
        shutil.rmtree(nameless)


def _prune(output_dir: Path, step: int, *, keep: int) -> None:
    folders = find_checkpoints(output_dir)
    valid = [path for path in folders if _step(path) <= step and _damage(path, hashes=False) is None]
    first = [valid[-1], best_checkpoint(valid) or valid[-1]]
    kept = list(dict.fromkeys([*first, *reversed(valid)]))[: max(keep, len(set(first)))]
    for folder in folders:
        if folder not in kept:
            _remove(folder)


def best_checkpoint(folders: list[Path]) -> Path | None:
    """Of these whole checkpoints the one with the highest score, the newest of equals; None where none has one."""
    scores = {folder: _read(folder)[0].score for folder in reversed(folders)}
    return max((folder for folder in scores if scores[folder] is not None), key=lambda f: scores[f] or 0, default=None)


def _read(folder: Path) -> tuple[FitState, dict[str, Any], dict[str, Any]]:
    """State, settings and files of a checkpoint."""
    record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    settings, files = dict(record.pop("settings")), dict(record.pop("files"))
    return FitState(**record), settings, files


def load_checkpoint(
    accelerator: Accelerator, wanted: str | None, output_dir: Path, settings: dict[str, Any]
) -> FitState:
    """Restore the wanted checkpoint; its state, that of step 0 where none is wanted or none is there yet.

    Args:
        wanted: None, `latest`, or a checkpoint folder. `latest` passes over damaged ones, and names them.
        settings: what must be as it was when the checkpoint was made; JSON values.

    Raises:
        ConfigError: the folder is no whole checkpoint, none of them is whole, or it was made with other settings.
    """
    # Only the main process reads and hashes; it tells the others the result.
    chosen: list[Any] = [_choose(wanted, output_dir, settings) if accelerator.is_main_process else None]
    folder, state, complaint = broadcast_object_list(chosen)[0]
    if complaint:
        raise ConfigError(complaint)
    if folder is None:
        return FitState()
    _restore(accelerator, folder)
    return state


def load_best(accelerator: Accelerator, output_dir: Path) -> FitState | None:
    """Restore the whole checkpoint with the highest score; its state, or None where none has one."""
    mine = find_checkpoints(output_dir) if accelerator.is_main_process else []
    best = best_checkpoint([path for path in mine if _damage(path) is None])
    best, state = broadcast_object_list([best, None if best is None else _read(best)[0]])
    if best is not None:
        _restore(accelerator, best)
    return state


def _restore(accelerator: Accelerator, folder: Path) -> None:
    try:
        accelerator.load_state(str(folder))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.PickleError, SafetensorError) as error:
        raise ConfigError(f"{folder} is damaged ({one_line(error)}): remove it, or name another checkpoint") from None
    accelerator.wait_for_everyone()


def _choose(
    wanted: str | None, output_dir: Path, settings: dict[str, Any]
) -> tuple[Path | None, FitState | None, str | None]:
    """The checkpoint to go on from with its state, and what is wrong with it or with all of them."""
    if wanted is None:
        return None, None, None
    folders = find_checkpoints(output_dir)[::-1] if wanted == "latest" else [Path(wanted)]
    for folder in folders:
        if (damage := _damage(folder)) is None:
            state, before, _ = _read(folder)
            return folder, state, _difference(folder, before, settings)
        if wanted != "latest":
            return folder, None, f"{folder} is {damage}: name another {PREFIX}STEP folder, or latest"
        logger.warning("%s is %s: passed over", folder, damage)
    if folders:
        return None, None, f"no checkpoint in {output_dir} is whole: start anew in another output_dir"
    return None, None, None


def _damage(folder: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None where every file is as it was written (by size, and by hash)."""
    try:
        _, _, files = _read(folder)
        for name, written in files.items():
            size = (folder / name).stat().st_size
            if size != written["bytes"]:
                return f"damaged ({name} has {size} of {written['bytes']} bytes)"
            if hashes and file_sha256(folder / name) != written["sha256"]:
                return f"damaged ({name} is not what was written)"
    except FileNotFoundError as error:
        return f"not a whole checkpoint ({Path(error.filename).name} is missing)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"not a whole checkpoint ({STATE_FILE} cannot be read)"
    return None


def _difference(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> str | None:
    changed = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
    if not changed:
        return None
    listed = ", ".join(f"{key} ({before.get(key)!r} there, {settings.get(key)!r} now)" for key in changed)
    return f"{folder} was made with other settings: {listed}; use those, or start anew in another output_dir"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named as checkpoints, by rising step; whole or not."""
    folders = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))
