"""`FeatureCache`: features on disk, computed once per sequence. (With `features: online` nothing is stored.)"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from train.features.extractor import FeatureExtractor, Features, Sequences

SHARD = 256


class FeatureCache:
    """Features of every sequence on disk, in safetensors files of 256 sequences each.

    Args:
        folder: created if absent; features of other settings in it are not read.
        settings: what the features depend on; their hash names a subfolder.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)

    def fill(
        self,
        sequences: Sequences,
        extract: FeatureExtractor,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[int]:
        """Compute the missing files, divided over the ranks; yield the number of sequences done after each file."""
        starts = range(0, len(sequences), SHARD)
        for number, start in enumerate(starts):
            rows = sequences.rows[start : start + SHARD]
            path = self._path(number)
            if number % world_size == rank and not path.exists():
                order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]) + len(rows[index][1]))
                parts: dict[int, Features] = {}
                for first in range(0, len(order), batch_size):
                    batch = order[first : first + batch_size]
                    parts |= dict(zip(batch, extract([rows[index] for index in batch]).split(), strict=True))
                self._write(path, Features.join([parts[index] for index in range(len(rows))]))
            yield min(start + SHARD, len(sequences))

    def __getitem__(self, index: int) -> Features:
        """Features of one sequence."""
        with safe_open(self._path(index // SHARD), framework="pt") as file:
            lengths = file.get_tensor("lengths").tolist()
            start = sum(lengths[: index % SHARD])
            stop = start + lengths[index % SHARD]
            read = {name: file.get_slice(name)[start:stop] for name in file.keys() if name != "lengths"}  # noqa: SIM118
        hidden = {int(name[7:]): tensor for name, tensor in read.items() if name.startswith("hidden.")}
        rest = {name: tensor for name, tensor in read.items() if not name.startswith("hidden.")}
        return Features(hidden=hidden, lengths=[stop - start], **rest)

    def _path(self, number: int) -> Path:
        return self.folder / f"features-{number:05d}.safetensors"

    def _write(self, path: Path, features: Features) -> None:
        tensors = {f"hidden.{layer}": tensor for layer, tensor in features.hidden.items()}
        names = [field.name for field in fields(features) if field.name not in ("hidden", "lengths")]
        tensors |= {name: getattr(features, name) for name in names}
        tensors["lengths"] = torch.tensor(features.lengths)
        unfinished = path.with_suffix(".tmp")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
        unfinished.replace(path)
