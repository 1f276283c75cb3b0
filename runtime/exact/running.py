"""What a model is at this moment, as far as generation runs through it, and whether it may be driven part by part.

SpecBound calls a model's parts itself, on blocks of tokens. That gives the model's own tokens only where the parts
do what their classes say. Code of others in the way (a hook, a subclass, a replaced `forward`) may do anything, so
such a model decodes by stock's own loop. Knows no policy and no probe.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from runtime.adapter.identity import plain_tensors
from runtime.decoding.layers import DecoderLayers, check_supported
from runtime.errors import UnsupportedModel

# Whose modules may run on a block; the probe then decides whether each row keeps its bits.
KNOWN = ("torch", "transformers", "peft", "torchao", "bitsandbytes")
# Of these packages, what runs a module in another way than its `forward` says.
OTHER_RUNNERS = ("torch._dynamo", "torch.jit", "torch.fx", "torch.nn.parallel", "torch.distributed.fsdp")
# Hooks that change no value: transformers' records of hidden states, and those of tensor parallelism.
NEUTRAL_HOOKS = ("transformers.", "torch.distributed.tensor.")
# What stock's loop calls on the model itself.
LOOP = ("forward", "__call__", "prepare_inputs_for_generation", "_prefill", "_update_model_kwargs_for_generation")
# The stock class that a speculating class was made of (see generate.py).
STOCK = "_specbound_stock"

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_CLASS_DATA = frozenset(
    [
        "__module__",
        "__qualname__",
        "__doc__",
        "__dict__",
        "__weakref__",
        "__annotations__",
        "__init__",
        "__firstlineno__",
        "__static_attributes__",
        "__abstractmethods__",
        "_abc_impl",
        "__parameters__",
        "__annotate_func__",
        "__annotations_cache__",
    ]
)
# What computes the same in training mode; a LoRA added after load is in it, and its dropout is a module of its own.
_SAME_IN_TRAINING = (nn.Linear, nn.Embedding, nn.Identity, nn.ModuleDict, nn.ModuleList, nn.ParameterDict)
_SIMPLE = (int, float, str, bool, type(None), torch.dtype)
_ENVIRONMENT = ("ONEDNN_", "DNNL_", "MKL_", "ATEN_", "CUBLAS_", "NVIDIA_TF32")


def structure(model: nn.Module) -> tuple[Any, ...]:
    """Everything but the tensors: equal before and after means that the same code runs, with the same settings.

    Objects are compared by identity, and held here so that no new one takes their address.
    """
    parts: list[Any] = [*_hooks(torch_module.__dict__, "_global"), tuple(_settings(vars(model.config)))]
    for module in model.modules():
        values = module.__dict__
        parts.append((type(module), type(module).forward, tuple(module._modules)))
        parts += _hooks(values)
        for name, value in values.items():
            if name not in _INTERNAL:
                if isinstance(value, _SIMPLE):
                    parts.append((name, value))
                elif callable(value):
                    parts.append(value)
                elif isinstance(value, (list, tuple, dict, set)) and (plain := _plain(value)) is not None:
                    parts.append((name, plain))
    return tuple(parts)


def tensors(model: nn.Module) -> tuple[Any, ...]:
    """Where every tensor lies, how it is laid out, and how often it was written; a write through `.data` is not seen."""
    return tuple(
        (tensor.data_ptr(), _version(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        for tensor in _all_tensors(model)
        if not tensor.is_meta
    )


def settings() -> tuple[Any, ...]:
    """What else decides which kernels run: torch's switches, and variables that its libraries read."""
    return (
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,  # type: ignore[attr-defined]
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        *sorted((name, value) for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)),
    )


def digest(model: nn.Module) -> str:
    """The same for a file: what runs and every bit of every weight, 64 hex digits; no addresses, only alignments."""
    hashed = hashlib.sha256(repr((settings(), list(_settings(vars(model.config))))).encode())
    for name, module in model.named_modules():
        own = sorted((key, repr(value)) for key, value in vars(module).items() if isinstance(value, _SIMPLE))
        kind = type(module)
        stock: type = kind.__dict__.get(STOCK, kind)
        hashed.update(repr((name, stock.__module__, stock.__qualname__, len(module._forward_hooks), own)).encode())
    for tensor in _all_tensors(model):
        layout = (tensor.dtype, str(tensor.device), tuple(tensor.shape), tensor.stride(), tensor.data_ptr() % 64)
        hashed.update(repr((*layout, checksum(tensor))).encode())
    return hashed.hexdigest()


def checksum(tensor: Tensor) -> tuple[int, ...]:
    """The sum of all bits, 64 at a time, so that one changed bit is seen, and some of them by their place."""
    if tensor.is_meta or tensor.numel() == 0:
        return ()
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = flat[: flat.numel() // 8 * 8]
    if whole.data_ptr() % 8:
        whole = whole.clone()
    words = whole.view(torch.int64)
    rest = flat[whole.numel() :].tolist()
    # Parted at no multiple of a row: two rows or columns that change places are seen as well.
    first = words.numel() * 5 // 11
    return int(words[:first].sum()), int(words[first:].sum()), *words[:: max(1, words.numel() // 7)].tolist(), *rest


def why_stock(model: Any) -> str | None:
    """Why generation must run stock's own loop; None where the model's parts may be driven one by one."""
    try:
        check_supported(model)
        layers = DecoderLayers(model)
    except (UnsupportedModel, AttributeError) as error:
        return str(error)
    if any(torch_module.__dict__[name] for name in ("_global_forward_hooks", "_global_forward_pre_hooks")):
        return "a hook on all modules of the process is set"
    whole = _own_code(model)
    if whole is not None:
        return f"{whole} of the model is not transformers'"
    for index, layer in enumerate(layers.layers):
        if any(getattr(module, "layer_idx", index) != index for module in layer.modules()):
            return f"decoder layer {index} stands in another place than it was made for"
    if len(layers.layers) != model.config.num_hidden_layers:
        return f"the model has {len(layers.layers)} layers, its config says {model.config.num_hidden_layers}"
    for name, module in model.named_modules():
        reason = _why_not_module(module)
        if reason is not None:
            return f"{name or 'the model'} {reason}"
    return None


def _own_code(model: Any) -> str | None:
    """What of the model's own class stands in the way of transformers' loop; None for nothing."""
    kind = type(model)
    below: set[str] = set()
    for base in reversed(kind.__mro__):
        if STOCK not in base.__dict__:
            overridden = set(base.__dict__) & below - _CLASS_DATA
            if not _is_known(base.__module__) and overridden:
                return f"{base.__name__}.{min(overridden)}"
            if _is_known(base.__module__) or base is object:
                below |= set(dir(base))
    stock: Any = next((base.__dict__[STOCK] for base in kind.__mro__ if STOCK in base.__dict__), kind)
    for name in (*LOOP, "_sample"):
        if not _is_stock(getattr(stock, name)):
            return name
    for name in model.__dict__:
        if name != "forward" and callable(getattr(kind, name, None)):
            return name
    return None


def _why_not_module(module: nn.Module) -> str | None:
    """What of a module, of whatever kind, may do otherwise than its class says; None for nothing."""
    kind, values = type(module), module.__dict__
    if module.training and not isinstance(module, _SAME_IN_TRAINING) and not kind.__module__.startswith("peft."):
        return "is in training mode"
    if values.get("_compiled_call_impl") is not None or kind.__module__.startswith(OTHER_RUNNERS):
        return "is compiled or run by a wrapper"
    if not all(_is_known(base.__module__) or STOCK in base.__dict__ or _adds_only(base) for base in kind.__mro__):
        return f"is a {kind.__name__}, whose code is not known"
    if not _is_stock(kind.forward) or not _is_stock(kind.__call__):
        return f"is a {kind.__name__} whose forward was replaced"
    for hook in _hooks(values):
        if not _origin(hook).startswith(NEUTRAL_HOOKS):
            return "has a hook"
    for name, value in values.items():
        if name == "forward":
            if not _only_moves(module):
                return "has a forward of its own"
        elif name not in _INTERNAL and callable(value) and not _only_moves(module) and not _is_stock(value):
            return f"has a {name} of its own"
    if any(
        tensor.is_meta for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None
    ):
        return "has weights that are not in memory"
    return None


def _adds_only(base: type) -> bool:
    """Whether a class of the user's overrides nothing of those that it is made of."""
    inherited = {name for other in base.__mro__[1:] for name in dir(other)}
    return not set(base.__dict__) & inherited - _CLASS_DATA


def _only_moves(module: nn.Module) -> bool:
    """Whether a `forward` in the module's own dictionary is accelerate's, and moves tensors between devices."""
    forward, before = module.__dict__.get("forward"), module.__dict__.get("_old_forward")
    if not isinstance(forward, partial) or not _origin(forward).startswith("accelerate."):
        return False
    hook: Any = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", [hook])
    known = all(type(one).__name__ == "AlignDevicesHook" and not one.offload for one in hooks)
    return known and getattr(before, "__func__", None) is type(module).forward


def _is_known(name: str) -> bool:
    return name.partition(".")[0] in (*KNOWN, "builtins", "abc", "typing")


def _is_stock(function: Any) -> bool:
    """Whether a function and all that it wraps is code of a known package."""
    while function is not None:
        if not _is_known(_origin(function)):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _origin(function: Any) -> str:
    """The module that a function's code stands in, whatever name it goes by."""
    while isinstance(function, (partial, MethodType)):
        function = function.func if isinstance(function, partial) else function.__func__
    if isinstance(function, FunctionType):
        return str(function.__globals__.get("__name__", ""))
    if isinstance(function, (type, BuiltinFunctionType)):
        return str(function.__module__ or "builtins")
    return str(type(function).__module__)


def _hooks(values: dict[str, Any], prefix: str = "") -> list[Any]:
    """Forward hooks among a module's values; with `_global`, those on all modules."""
    found: list[Any] = []
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        if hooks := values.get(prefix + name):
            found += hooks.values()
    return found


def _plain(value: Any) -> tuple[Any, ...] | None:
    """A container of simple values as a tuple; None for any other."""
    items = tuple(value.items()) if isinstance(value, dict) else tuple(value)
    flat = [part for item in items for part in item] if isinstance(value, dict) else items
    return items if all(isinstance(part, _SIMPLE) for part in flat) else None


def _settings(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a config says, but for names and paths."""
    for name, value in values.items():
        if name not in ("name_or_path", "_name_or_path", "_commit_hash", "transformers_version"):
            if isinstance(value, _SIMPLE):
                yield name, value
            elif isinstance(value, (list, tuple, dict, set)):
                yield name, repr(value)


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and plain tensors that modules hold; of a quantised one all that it is made of."""
    for module in model.modules():
        held: Iterable[Any] = (*module._parameters.values(), *module._buffers.values())
        for tensor in (*held, *(value for value in module.__dict__.values() if isinstance(value, Tensor))):
            if type(tensor) in (nn.Parameter, Tensor):
                yield tensor
            elif tensor is not None:
                yield from (part for _, part in plain_tensors([("", tensor)]))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
