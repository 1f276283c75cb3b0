"""Adapter folders: written whole or not at all, read strictly; a folder on disk or a repository on the Hub.

Tensors are safetensors, never pickle; nothing in a folder is executed. Knows nothing of generation.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.config import MAX_CONFIG_BYTES, VERSION, SpecBoundConfig
from runtime.errors import AdapterError
from runtime.heads import ExitHeads
from runtime.identity import file_sha256

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DRAFT_TO_TARGET = "draft_to_target"
HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory: config, heads, and target token id of each draft id, shape [V], int64."""

    config: SpecBoundConfig
    heads: ExitHeads
    draft_to_target: Tensor


def save_adapter(
    adapter: Adapter, folder: str | Path, *, extra: Callable[[Path], None] | None = None
) -> SpecBoundConfig:
    """Write an adapter folder; whoever looks sees the old folder or the whole new one.

    Args:
        folder: created or replaced.
        extra: called with the unfinished folder, to put further files (card, evidence) in before it appears.

    Returns:
        The config as written, with the hash of the weights.

    Raises:
        AdapterError: the folder cannot be written, or exists and is something else.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG_FILE).exists())):
        raise AdapterError(f"{folder} exists and is not an adapter: name another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise AdapterError(f"cannot write {folder}: {error.strerror}") from None
    try:
        config = _write(adapter, unfinished)
        if extra is not None:
            extra(unfinished)
        for path in unfinished.rglob("*"):
            if path.is_file():
                _fsync(path)
        unfinished.chmod(0o755)
        _swap(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return config


def _write(adapter: Adapter, folder: Path) -> SpecBoundConfig:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.heads.state_dict().items()}
    tensors[DRAFT_TO_TARGET] = adapter.draft_to_target.cpu().to(torch.int64)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", "specbound_version": VERSION})
    config = replace(adapter.config, weights_sha256=file_sha256(folder / WEIGHTS_FILE))
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    return config


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _swap(unfinished: Path, folder: Path) -> None:
    """Put the finished folder in place; an older one is set aside first and removed last."""
    aside = None
    if folder.exists():
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
        os.replace(folder, aside)
    try:
        os.replace(unfinished, folder)
    except OSError:
        if aside is not None:
            os.replace(aside, folder)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def resolve_adapter(
    adapter: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Folder of an adapter: itself, or the snapshot of a Hub repository.

    Raises:
        AdapterError: neither a folder nor a repository that can be read.
    """
    path = Path(adapter)
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterError(f"{adapter} is a file: expected the adapter's folder or a Hub id")
    try:
        return Path(
            snapshot_download(
                str(adapter),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, "*.json", "*.md", "*.yaml"],
                library_name="specbound",
                library_version=VERSION,
            )
        )
    except HFValidationError:
        raise AdapterError(f"{adapter} is neither a folder nor a Hub id of the form ORG/NAME") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(f"{adapter} is no folder here, and the Hub could not give it: {first}") from None


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder strictly, on CPU.

    Raises:
        AdapterError: a file missing or damaged; a tensor missing, extra, misshapen, of another dtype or not finite.
    """
    folder = Path(folder)
    config = _read_config(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise AdapterError(f"{weights} is missing: the adapter is not whole, download it again")
    found = file_sha256(weights)
    tensors = _read_tensors(weights)
    heads = ExitHeads(
        config.head,
        config.exit_layers,
        hidden_size=config.hidden_size,
        draft_vocab_size=config.draft_vocab_size,
        rank=config.head_rank,
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    wanted[DRAFT_TO_TARGET] = (config.draft_vocab_size,)
    _check_tensors(tensors, wanted, config, weights)
    if found != config.weights_sha256:
        raise AdapterError(f"{weights} has sha256 {found}, its config.json says {config.weights_sha256}: download again")
    draft_to_target = tensors.pop(DRAFT_TO_TARGET)
    heads.load_state_dict(tensors, strict=True)
    return Adapter(config, heads.requires_grad_(False).eval(), draft_to_target)


def _read_config(folder: Path) -> SpecBoundConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{path} is missing: {folder} is not an adapter")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} has {path.stat().st_size} bytes: expected at most {MAX_CONFIG_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    return SpecBoundConfig.from_json(text, source=str(path))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        size = path.stat().st_size
        raise AdapterError(f"{path} ({size} bytes) is incomplete or damaged, download it again: {error}") from None


def _check_tensors(
    tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], config: SpecBoundConfig, path: Path
) -> None:
    faults: list[str] = []
    faults += [f"missing {name}" for name in sorted(wanted.keys() - tensors.keys())]
    faults += [f"unexpected {name}" for name in sorted(tensors.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & tensors.keys()):
        faults += _tensor_faults(name, tensors[name], wanted[name], config)
    if faults:
        raise AdapterError(f"{path} does not fit its config.json: {'; '.join(faults)}")


def _tensor_faults(name: str, tensor: Tensor, shape: tuple[int, ...], config: SpecBoundConfig) -> list[Any]:
    if tuple(tensor.shape) != shape:
        return [f"{name} has shape {tuple(tensor.shape)}, expected {shape}"]
    if name == DRAFT_TO_TARGET:
        if tensor.dtype != torch.int64:
            return [f"{name} has dtype {tensor.dtype}, expected torch.int64"]
        in_range = bool(((tensor >= 0) & (tensor < config.vocab_size)).all())
        if not in_range or tensor.unique().numel() != tensor.numel():
            return [f"{name} must hold different token ids from 0 to {config.vocab_size - 1}"]
        return []
    if tensor.dtype not in HEAD_DTYPES:
        return [f"{name} has dtype {tensor.dtype}, expected a float dtype"]
    return [] if bool(torch.isfinite(tensor).all()) else [f"{name} has values that are not finite"]
