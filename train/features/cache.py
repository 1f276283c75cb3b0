"""`FeatureCache`: features on disk, computed once per sequence. (With `features: online` nothing is stored.)

Beside each file lies its SHA-256: one that was cut short or changed is computed anew, and never read.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime import DataError
from runtime.adapter.identity import file_sha256
from runtime.files import write_atomic
from train.features.extractor import FeatureExtractor, Features, Sequences
from train.features.prompts import Prompts

logger = logging.getLogger(__name__)

SHARD = 256
HIDDEN, PROMPTS = "hidden.", "prompts."  # how names of tensors begin


class FeatureCache:
    """Features of every sequence on disk, in safetensors files of 256 sequences each.

    Args:
        folder: created if absent; features of other settings in it are not read.
        settings: what the features depend on; their hash names a subfolder.

    Attributes:
        lock: to be held while files are computed where several fits share the folder.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = folder / key
        self.lock = FileLock(folder / f"{key}.lock")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checked: set[int] = set()  # files that this process has compared with their hash

    def fill(
        self,
        sequences: Sequences,
        extract: FeatureExtractor,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[int]:
        """Compute missing and damaged files, divided over the ranks; yield the number of sequences done after each."""
        starts = range(0, len(sequences), SHARD)
        for number, start in enumerate(starts):
            rows = sequences.rows[start : start + SHARD]
            path = self._path(number)
            if number % world_size == rank and not self._is_whole(number):
                if path.exists():
                    logger.warning("%s is not as it was written: computing it anew", path)
                order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]) + len(rows[index][1]))
                parts: dict[int, Features] = {}
                for first in range(0, len(order), batch_size):
                    batch = order[first : first + batch_size]
                    parts |= dict(zip(batch, extract([rows[index] for index in batch]).split(), strict=True))
                self._write(path, Features.join([parts[index] for index in range(len(rows))]))
            yield min(start + SHARD, len(sequences))

    def __getitem__(self, index: int) -> Features:
        """Features of one sequence.

        Raises:
            DataError: its file is missing, or not as it was written.
        """
        number, within = divmod(index, SHARD)
        if not self._is_whole(number):
            raise DataError(f"{self._path(number)} is missing or not as it was written: run again, to compute it anew")
        with safe_open(self._path(number), framework="pt") as file:
            names = list(file.keys())
            spans = {}
            for prefix in {name.rpartition("lengths")[0] for name in names if name.endswith("lengths")}:
                lengths = file.get_tensor(f"{prefix}lengths").tolist()
                spans[prefix] = (sum(lengths[:within]), sum(lengths[: within + 1]))
            read: dict[str, Any] = {}
            for name in names:
                prefix = PROMPTS if name.startswith(PROMPTS) else ""
                start, stop = spans[prefix]
                is_lengths = name == f"{prefix}lengths"
                read[name] = [stop - start] if is_lengths else file.get_slice(name)[start:stop]
        prompts = {name.removeprefix(PROMPTS): read.pop(name) for name in names if name.startswith(PROMPTS)}
        return Features(**_nested(read), prompts=Prompts(**_nested(prompts)) if prompts else None)

    def _path(self, number: int) -> Path:
        return self.folder / f"features-{number:05d}.safetensors"

    def _is_whole(self, number: int) -> bool:
        """Whether a file is as it was written; read for it once in a process."""
        path = self._path(number)
        if number not in self._checked:
            expected = path.with_suffix(".sha256")
            if not path.is_file() or not expected.is_file() or expected.read_text() != file_sha256(path):
                return False
            self._checked.add(number)
        return True

    def _write(self, path: Path, features: Features) -> None:
        tensors = _flat(features)
        if features.prompts is not None:
            tensors |= {f"{PROMPTS}{name}": tensor for name, tensor in _flat(features.prompts).items()}
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

        def write(file: IO[bytes]) -> None:
            save_file(whole, file.name)
            write_atomic(path.with_suffix(".sha256"), file_sha256(Path(file.name)).encode())

        write_atomic(path, write)


def _flat(states: Features | Prompts) -> dict[str, Tensor]:
    """Tensors by name; hidden states as `hidden.<layer>`."""
    tensors = {f"{HIDDEN}{layer}": tensor for layer, tensor in states.hidden.items()}
    values = {field.name: getattr(states, field.name) for field in fields(states)}
    tensors |= {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors | {"lengths": torch.tensor(states.lengths)}


def _nested(read: dict[str, Any]) -> dict[str, Any]:
    """What `_flat` was made from."""
    hidden = {int(name.removeprefix(HIDDEN)): read[name] for name in read if name.startswith(HIDDEN)}
    return {name: value for name, value in read.items() if not name.startswith(HIDDEN)} | {"hidden": hidden}
