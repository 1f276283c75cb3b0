"""Checks that the disk has room for cached features, before any are written.

It does not depend on how features are computed or laid out: it adds up the tensors of some texts.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.errors import ConfigError

MARGIN = 1.02  # headers of the files, and the blocks of the file system


def bytes_per_position(features: Any) -> float:
    """Bytes on disk of one response position.

    Args:
        features: of some texts: a dataclass of tensors and dictionaries of tensors, with `lengths`.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(features)) / sum(features.lengths)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def require_disk(folder: Path, needed: float, *, own: Iterable[Path]) -> str:
    """Check that a folder's disk has room; returns a line with what is needed and what is free.

    Args:
        folder: may not exist yet.
        needed: bytes in all.
        own: where they go in the folder. Files already there are not written again, and subtracted from the need.

    Raises:
        ConfigError: less is free than is still to be written.
    """
    there = sum(path.stat().st_size for part in own for path in part.glob("*.safetensors"))
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    left = max(0.0, needed * MARGIN - there)
    line = f"cached features take {readable(needed)} in {folder}; {readable(left)} to write, {readable(free)} free"
    if left > free:
        raise ConfigError(f"{line}: use --features online, fewer exits or prompts, or another features_dir")
    return line


def readable(size: float) -> str:
    """Format bytes as `3.2 GB`; 1 GB is 10**9 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
