"""Whether a model may be driven part by part at this moment, or must decode by stock's own loop.

SpecBound calls a model's parts itself, on blocks of tokens. That gives the model's own tokens only where the parts
do what their classes say. Code of others in the way (a hook, a subclass, a replaced `forward`) may do anything, so
such a model decodes by stock's own loop. Knows no policy and no probe.
"""

from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.decoding.families import CACHE, check_supported
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.wrappers import text_modules
from runtime.errors import UnsupportedModel
from runtime.exact.attention import SUPPORTED, implementation_for
from runtime.exact.execution import mixtures
from runtime.exact.fingerprint import INTERNAL, STOCK, hooks_of

# How mixtures of experts may compute.
EXPERTS = ("eager", "batched_mm", "grouped_mm")
# Whose modules may run on a block; the probe then decides whether each row keeps its bits.
KNOWN = ("torch", "transformers", "peft", "torchao", "bitsandbytes")
# Of these packages, what runs a module in another way than its `forward` says.
OTHER_RUNNERS = ("torch._dynamo", "torch.jit", "torch.fx", "torch.nn.parallel", "torch.distributed.fsdp")
# Hooks that change no value: transformers' records of hidden states, and those of tensor parallelism.
NEUTRAL_HOOKS = ("transformers.", "torch.distributed.tensor.")
# What stock's loop calls on the model itself.
LOOP = ("forward", "__call__", "prepare_inputs_for_generation", "_prefill", "_update_model_kwargs_for_generation")
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


def why_stock(model: Any) -> str | None:
    """Why generation must run stock's own loop; None where the model's parts may be driven one by one."""
    unknown = unknown_version()
    if unknown is not None:
        return unknown
    try:
        check_supported(model)
        layers = DecoderLayers(model)
    except (UnsupportedModel, AttributeError) as error:
        return str(error)
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in SUPPORTED or not _is_stock(ALL_ATTENTION_FUNCTIONS.get(attention)):
        return f"its attention implementation is {attention!r}: load it with {implementation_for(model)}"
    experts = _why_not_experts(model)
    if experts is not None:
        return experts
    if any(torch_module.__dict__[name] for name in ("_global_forward_hooks", "_global_forward_pre_hooks")):
        return "a hook on all modules of the process is set"
    whole = _own_code(model)
    if whole is not None:
        return f"{whole} of the model is not transformers'"
    for index, layer in enumerate(layers.layers):
        if any(getattr(module, "layer_idx", None) not in (None, index) for module in layer.modules()):
            return f"decoder layer {index} stands in another place than it was made for"
    if len(layers.layers) != config.num_hidden_layers:
        return f"the model has {len(layers.layers)} layers, its config says {config.num_hidden_layers}"
    for name, module in text_modules(model):
        reason = _why_not_module(module)
        given = module.__dict__.get("config") if "layer_idx" in module.__dict__ else None
        if isinstance(given, PreTrainedConfig) and given is not config and given is not model.config:
            reason = "has a config of its own"  # how it attends to a block is said in the model's
        if reason is not None:
            return f"{name or 'the model'} {reason}"
    return None


def unknown_version() -> str | None:
    """Why this transformers cannot be driven, and what to install; None where it can."""
    if CACHE:
        return None
    return f"transformers {transformers.__version__} is newer than what is known: pip install 'transformers<5.25'"


def _why_not_experts(model: Any) -> str | None:
    """Why its mixtures of experts, if it has any, may compute otherwise row by row; None where they do not."""
    kind = model.config.get_text_config()._experts_implementation
    if not mixtures(model):
        return None
    if kind not in EXPERTS or not (kind == "eager" or _is_stock(ALL_EXPERTS_FUNCTIONS.get(kind))):
        return f"its experts implementation is {kind!r}: load it with experts_implementation='batched_mm'"
    if kind == "grouped_mm" and model.device.type != "cpu":  # transformers' loop takes another one after the prompt
        return "its experts implementation changes after the prompt: load it with experts_implementation='batched_mm'"
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
            return str(name)
    for name in model.__dict__:
        if name != "forward" and callable(getattr(kind, name, None)):
            return str(name)
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
    for hook in hooks_of(values):
        if not _origin(hook).startswith(NEUTRAL_HOOKS):
            return "has a hook"
    for name, value in values.items():
        if name == "forward":
            if not _only_moves(module):
                return "has a forward of its own"
        elif name not in INTERNAL and callable(value) and not _only_moves(module) and not _is_stock(value):
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
