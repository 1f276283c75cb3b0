"""A fingerprint of the running model: the code that generation runs through, its settings, and every tensor.

`structure`, `settings` and `tensors` are cheap and compared before each call, within one process; `digest` goes into
a certificate's file name. Knows no policy and no probe.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.adapter.identity import plain_tensors
from runtime.decoding.wrappers import holder, text_modules, towers

# The stock class that a speculating class was made of (see generate.py).
STOCK = "_specbound_stock"
INTERNAL = frozenset(vars(nn.Module())) - {"training"}
SAMPLED = 64  # of so many rows one is summed by column too
WIDTH = 2**10  # words in a row of a tensor whose own rows are not whole words
# Of `torch.backends`: how float32 products are rounded, under older and newer names.
_PRECISIONS = (
    "cuda.matmul.allow_tf32", "fp32_precision", "mkldnn.fp32_precision", "mkldnn.matmul.fp32_precision",
    "cuda.matmul.fp32_precision",
)  # fmt: skip
_SIMPLE = (int, float, str, bool, type(None), torch.dtype)
_ENVIRONMENT = ("TRANSFORMERS_SDPA_", "ONEDNN_", "DNNL_", "MKL_", "ATEN_", "CUBLAS_", "NVIDIA_TF32")


def structure(model: PreTrainedModel) -> tuple[Any, ...]:
    """Everything but the tensors: equal before and after means that the same code runs, with the same settings.

    Objects are compared by identity, and held here so that no new one takes their address.
    """
    parts: list[Any] = [*hooks_of(torch_module.__dict__, "_global"), *_settings(model.config)]
    text = model.config.get_text_config()
    parts.append(ALL_ATTENTION_FUNCTIONS.get(text._attn_implementation))
    for module in _modules(model):
        values = module.__dict__
        parts += (type(module), type(module).forward, *values["_modules"])
        parts += hooks_of(values)
        for name in sorted(values.keys() - INTERNAL):
            value = values[name]
            if value is None:  # a wrapper has nothing where it will keep what it knows of a prompt
                continue
            if isinstance(value, _SIMPLE):
                parts.append((name, value))
            elif callable(value):
                parts.append(value)
            elif isinstance(value, (list, tuple, dict, set)) and (plain := _plain(value)) is not None:
                parts.append((name, plain))
            elif isinstance(value, PreTrainedConfig):
                parts.append((name, id(value)))  # by itself two are equal where they say the same
                parts += () if value is model.config or value is text else _settings(value)
    return tuple(parts)


def tensors(model: nn.Module) -> tuple[Any, ...]:
    """Where every tensor lies, its layout, and how often it was written; a write through `.data` is not seen."""
    return tuple(
        (tensor.data_ptr(), _version(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        for tensor in _all_tensors(model)
        if not tensor.is_meta
    )


def settings() -> tuple[Any, ...]:
    """What else decides which kernels run: torch's switches, and variables that its libraries read."""
    return (
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        _said(torch.get_float32_matmul_precision),
        *(_said(partial(attrgetter(name), torch.backends)) for name in _PRECISIONS),
        torch.backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        torch.backends.cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        torch.backends.cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        *sorted((name, value) for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)),
    )


def _said(setting: Callable[[], Any]) -> Any:
    """A setting; None where this torch has none of the name, or asks for one of its other names."""
    try:
        return setting()
    except (AttributeError, RuntimeError):  # torch refuses to say the old settings where new ones were set otherwise
        return None


def digest(model: nn.Module) -> str:
    """The same for a file: what runs and every bit of every weight, 64 hex digits; no addresses, only alignments."""
    hashed = hashlib.sha256(repr((settings(), list(_settings(model.config)))).encode())
    for name, module in text_modules(model):
        simple = [(key, value) for key, value in vars(module).items() if isinstance(value, _SIMPLE)]
        own = sorted((key, repr(value)) for key, value in simple if value is not None)
        kind = type(module)
        stock: type = kind.__dict__.get(STOCK, kind)
        hashed.update(repr((name, stock.__module__, stock.__qualname__, len(module._forward_hooks), own)).encode())
    for tensor in _all_tensors(model):
        layout = (tensor.dtype, str(tensor.device), tuple(tensor.shape), tensor.stride(), tensor.data_ptr() % 64)
        hashed.update(repr(layout).encode() + checksum(tensor).cpu().numpy().tobytes())
    return hashed.hexdigest()


def checksum(tensor: Tensor) -> Tensor:
    """Sums of all bits, 64 at a time, int64: by row, and of some rows by column.

    One changed bit is seen, and so are rows or columns that change places.
    """
    whole = tensor.detach().contiguous()
    return sums(words(whole if is_whole(whole) else whole.clone()))


def contents(model: nn.Module) -> Tensor:
    """`checksum` of all tensors, on the CPU."""
    return torch.cat([checksum(tensor).cpu() for tensor in _all_tensors(model)])


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor's memory can be read as words of 8 bytes: without gaps, from a multiple of 8 on."""
    begin = tensor.storage_offset() * tensor.element_size()
    return tensor.is_contiguous() and tensor.data_ptr() % 8 == 0 and begin % 8 == 0


def words(tensor: Tensor) -> list[tuple[Tensor, int]]:
    """The memory of a tensor in parts, each with the dimension that `sums` adds it up along; -1 is as it is.

    They are views: where the tensor is written, so are they. Only of a tensor that `is_whole`.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return []
    flat = tensor.detach().view(-1).view(torch.uint8)
    number = flat.numel() // 8
    aligned, rest = flat[: 8 * number].view(torch.int64), flat[8 * number :]
    whole_rows = tensor.dim() > 1 and number >= tensor.shape[0] and number % tensor.shape[0] == 0
    width = number // tensor.shape[0] if whole_rows else WIDTH
    table = aligned[: number // width * width].view(-1, width)
    parts = [(table, 1), (table[::SAMPLED], 0), (aligned[table.numel() :], -1), (rest, -1)]
    return [(part, dimension) for part, dimension in parts if part.numel()]


def sums(parts: list[tuple[Tensor, int]]) -> Tensor:
    """Of the words that are there now."""
    totals = [part.sum(dimension) if dimension >= 0 else part.long() for part, dimension in parts]
    return torch.cat(totals) if totals else torch.empty(0, dtype=torch.int64)


def hooks_of(values: dict[str, Any], prefix: str = "") -> list[Any]:
    """Forward hooks among a module's values; with `_global`, those on all modules."""
    forward_hooks: list[Any] = []
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        if hooks := values.get(prefix + name):
            forward_hooks += hooks.values()
    return forward_hooks


def _plain(value: Any) -> tuple[Any, ...] | None:
    """A container of simple values as a tuple; None for any other."""
    items = tuple(value.items()) if isinstance(value, dict) else tuple(value)
    flat = [part for item in items for part in item] if isinstance(value, dict) else items
    return items if all(isinstance(part, _SIMPLE) for part in flat) else None


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """What a config and that of the text inside it say, but for names and paths."""
    inner = config.get_text_config()
    for values in [vars(config)] if inner is config else [vars(config), vars(inner)]:
        for name, value in values.items():
            if name not in ("name_or_path", "_name_or_path", "_commit_hash", "transformers_version"):
                if isinstance(value, _SIMPLE):
                    yield name, value
                elif isinstance(value, (list, tuple, dict, set)):
                    yield name, repr(value)


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and plain tensors that modules hold; of a quantised one all that it is made of.

    What holds a wrapper's decoder keeps plain tensors of the last prompt, which say nothing of the next.
    """
    forgetful = holder(model)
    for module in _modules(model):
        values = module.__dict__
        held = [*values["_parameters"].values(), *values["_buffers"].values()]
        if module is not forgetful:
            held += [value for value in values.values() if isinstance(value, Tensor)]
        for tensor in held:
            if type(tensor) in (nn.Parameter, Tensor):
                yield tensor
            elif tensor is not None:
                yield from (part for _, part in plain_tensors([("", tensor)]))


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules but a wrapper's towers, each once; without names, which `nn.Module.modules` makes for each."""
    seen = towers(model)
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            yield module
            waiting += [child for child in module.__dict__["_modules"].values() if child is not None]


def _version(tensor: Tensor) -> int:
    """How often a tensor was written; -1 for one of inference mode, which counts nothing, whatever it says it is."""
    try:
        return tensor._version
    except RuntimeError:
        return -1
