"""Adapter folders: written whole or not at all, read strictly.

Tensors are safetensors, never pickle; nothing in a folder is executed. Knows nothing of the Hub or of
generation.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.adapter.config import MAX_CONFIG_BYTES, SpecBoundConfig
from runtime.adapter.identity import file_sha256
from runtime.drafting.heads import ExitHeads
from runtime.errors import AdapterError, SpecBoundError
from runtime.files import ROOM, is_full

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DRAFT_TO_TARGET = "draft_to_target"
HEAD_DTYPES = ("F32", "BF16", "F16")

# What a tensor is before it is read: its shape, and its dtype by safetensors' name.
Header = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory: config, heads, and target token id of each draft id, shape [V], int64."""

    config: SpecBoundConfig
    heads: ExitHeads
    draft_to_target: Tensor


def save_adapter(
    adapter: Adapter, folder: str | Path, *, extra: Callable[[Path], None] | None = None
) -> SpecBoundConfig:
    """Write an adapter folder: built beside it, then renamed into place.

    Whatever fails, an adapter that was there is there again. Only a process killed between the two renames
    leaves none, and the old one beside it as `.NAME-old-*/adapter`.

    Args:
        folder: created, or replaced with everything in it.
        extra: called with the unfinished folder, to put further files (card, evidence) in before it appears.

    Returns:
        The config as written, with the hash of the weights.

    Raises:
        AdapterError: the folder cannot be written, or holds something else; or the adapter would not load.
    """
    try:
        folder = Path(folder).resolve()  # of a link, what it points to is replaced
        if folder.exists() and not _is_replaceable(folder):
            raise AdapterError(f"{folder} exists and is not an adapter: name another folder or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:100]}-new-"))
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise _unwritable(folder, error) from None
    try:
        unfinished = work / "adapter"
        unfinished.mkdir()
        config = _write(adapter, unfinished)
        if extra is not None:
            extra(unfinished)
        for path in unfinished.rglob("*"):
            if path.is_file():
                _fsync(path)
        _swap(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return config


def _is_replaceable(folder: Path) -> bool:
    """Empty, or an adapter: a base model's folder has a config.json too, and must never be overwritten."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    path = folder / CONFIG_FILE
    return path.is_file() and b'"specbound_version"' in path.read_bytes()[:MAX_CONFIG_BYTES]


def _unwritable(folder: str | Path, error: Exception) -> Exception:
    if isinstance(error, SpecBoundError):
        return error
    advice = f": {ROOM}" if is_full(error) else ""
    return AdapterError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}{advice}")


def _write(adapter: Adapter, folder: Path) -> SpecBoundConfig:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.heads.state_dict().items()}
    tensors[DRAFT_TO_TARGET] = adapter.draft_to_target.cpu().to(torch.int64).contiguous()
    path = folder / WEIGHTS_FILE
    save_file(tensors, path, metadata={"format": "pt"})  # one key: several are written in any order, and bytes differ
    path.chmod(0o644)  # safetensors lets only the owner read it
    config = replace(adapter.config, weights_sha256=file_sha256(path))
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    load_adapter(folder)  # what cannot be loaded is not published
    return config


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _swap(unfinished: Path, folder: Path) -> None:
    """Put the finished folder in place; an older one is set aside first and removed last."""
    if not folder.exists():
        os.replace(unfinished, folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:100]}-old-"))
    try:
        os.replace(folder, aside / "adapter")
        try:
            os.replace(unfinished, folder)
        except BaseException:
            os.replace(aside / "adapter", folder)
            raise
    except BaseException:
        if not (aside / "adapter").exists():  # else it is the only one left
            shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder strictly, on CPU, each tensor in the dtype it is stored in.

    Raises:
        AdapterError: a file missing or damaged; a tensor missing, extra, misshapen, of another dtype or
            not finite.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = _regular(folder / WEIGHTS_FILE)
    with torch.device("meta"):  # no memory and no random numbers for weights that are read anyway
        heads = ExitHeads(
            config.head,
            config.exit_layers,
            hidden_size=config.hidden_size,
            draft_vocab_size=config.draft_vocab_size,
            rank=config.head_rank,
        )
    wanted = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    wanted[DRAFT_TO_TARGET] = (config.draft_vocab_size,)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _refuse(path, _header_faults(_header(file), wanted))
            if (digest := file_sha256(path)) != config.weights_sha256:
                raise AdapterError(
                    f"{path} has sha256 {digest}, its {CONFIG_FILE} says {config.weights_sha256}: download both again"
                )
            tensors = {name: file.get_tensor(name).clone() for name in wanted}
    except SpecBoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{path} is incomplete or damaged, download it again: {_first_line(error)}") from None
    _refuse(path, _value_faults(tensors, config.vocab_size))
    draft_to_target = tensors.pop(DRAFT_TO_TARGET)
    heads.load_state_dict(tensors, strict=True, assign=True)
    return Adapter(config, heads.requires_grad_(False).eval(), draft_to_target)


def _regular(path: Path) -> Path:
    """The path, if a file that can be read is there; links are followed, as a Hub cache is made of them."""
    try:
        if path.is_file():
            return path
        if not path.parent.is_dir():
            reason = f"{path.parent} is not a folder"
        elif path.exists() or path.is_symlink():
            reason = "it is not a regular file"
        else:
            reason = f"no such file in {path.parent}"
    except OSError as error:
        reason = error.strerror or str(error)
    raise AdapterError(f"{path.name} cannot be read, {reason}: expected the folder of a whole SpecBound adapter")


def _read_config(folder: Path) -> SpecBoundConfig:
    path = _regular(folder / CONFIG_FILE)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise AdapterError(f"{path} has more than {MAX_CONFIG_BYTES} bytes: expected an adapter's {CONFIG_FILE}")
        text = content.decode("utf-8")
    except SpecBoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} cannot be read, download it again: {_first_line(error)}") from None
    return SpecBoundConfig.from_json(text, source=str(path))


def _header(file: safe_open) -> Header:
    slices = {name: file.get_slice(name) for name in file.keys()}  # type: ignore[no-untyped-call] # noqa: SIM118
    return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def _header_faults(header: Header, wanted: dict[str, tuple[int, ...]]) -> Iterable[str]:
    """What is wrong with names, shapes and dtypes, before any tensor is read."""
    for name in sorted(wanted.keys() - header.keys()):
        yield f"missing {name}"
    for name in sorted(header.keys() - wanted.keys()):
        yield f"unexpected {name!a}"
    for name in sorted(wanted.keys() & header.keys()):
        shape, dtype = header[name]
        dtypes = ("I64",) if name == DRAFT_TO_TARGET else HEAD_DTYPES
        if shape != wanted[name]:
            yield f"{name} has shape {shape}, expected {wanted[name]}"
        elif dtype not in dtypes:
            yield f"{name} has dtype {dtype}, expected {' or '.join(dtypes)}"


def _value_faults(tensors: dict[str, Tensor], vocab_size: int) -> Iterable[str]:
    for name, tensor in tensors.items():
        if name != DRAFT_TO_TARGET:
            if not bool(torch.isfinite(tensor).all()):
                yield f"{name} has values that are not finite"
        elif tensor.min() < 0 or tensor.max() >= vocab_size or len(torch.unique(tensor)) != len(tensor):
            yield f"{name} must hold different token ids from 0 to {vocab_size - 1}"


def _refuse(path: Path, faults: Iterable[str]) -> None:
    problems = list(faults)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterError(f"{path} does not fit its {CONFIG_FILE}: {'; '.join(problems[:5])}{more}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
