"""Loads a frozen base sharded over the processes: FSDP2 through transformers, or DeepSpeed ZeRO-3. Needs no heads.

Each process holds a part of every parameter from loading on, and layers are gathered while they run. So all processes
must run the base equally often, and code that reads a parameter must gather it first. The heads are small and stay
whole on every process; accelerate is not told about the sharding.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from runtime.base import auto_class, from_pretrained
from runtime.decoding.layers import DecoderLayers

FSDP, ZERO_3 = "FSDP", "DeepSpeed ZeRO-3"
T = TypeVar("T")


def take_from_launcher() -> str | None:
    """Read how `accelerate launch` was asked to shard: `FSDP`, `ZERO_3` or None. Then hide it from accelerate."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        del os.environ["ACCELERATE_USE_FSDP"]
        return FSDP
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if zero and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        return ZERO_3
    return None


def load_spread(kind: str, name: str, *, dtype: torch.dtype, **options: Any) -> Any:
    """Load a base in evaluation mode, sharded over the processes; options are those of `from_pretrained`.

    Every process must call it, after the process group exists. Under FSDP a single process holds the whole base.
    """
    auto = auto_class(from_pretrained(AutoConfig, name, options))
    if kind == FSDP:
        spread = DistributedConfig(fsdp_size=PartialState().num_processes)
        model = from_pretrained(auto, name, options | {"dtype": dtype, "distributed_config": spread})
        model.eval().requires_grad_(False)
        # FSDP2 takes the first module that runs as the root. So the base runs once here, before its parts run alone.
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
        return model
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    settings |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    request = HfDeepSpeedConfig(settings)  # from_pretrained looks for a live one
    model = from_pretrained(auto, name, options | {"dtype": dtype})
    del request
    engine = deepspeed.initialize(model=model.eval().requires_grad_(False), config=settings)[0]
    model.spread_by = [
        engine
    ]  # kept, because without it parameters are no longer gathered; in a list, because it is a module
    return model


def first_says(what: Callable[[], T]) -> T:
    """What the first process computes, on all of them.

    Whatever decides how often a base that is spread runs must be the same to the last bit on every process: one that
    runs it once more waits for the others for ever.
    """
    return cast(T, broadcast_object_list([what() if PartialState().is_main_process else None])[0])


def is_spread(model: Any) -> bool:
    """Whether each process holds only a part of the model."""
    return any(isinstance(each, DTensor) or hasattr(each, "ds_id") for each in model.parameters())


def whole_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole value of every parameter, one at a time; if the module is sharded, all processes must iterate."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # FSDP2 leaves the root gathered, and tied weights are then separate
    for name, parameter in module.named_parameters():
        with _whole(parameter) as whole:
            yield name, whole


@contextmanager
def _whole(parameter: Tensor) -> Iterator[Tensor]:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def shaped(model: Any) -> Any:
    """The model itself; if it is sharded, a model of the same shapes on the `meta` device."""
    if not is_spread(model):
        return model
    with torch.device("meta"):
        return auto_class(model.config).from_config(copy.deepcopy(model.config))


def decoder_layers(model: Any) -> DecoderLayers:
    """The parts of a sharded base; final norm and unembedding are whole copies, which can run at any time."""
    layers, empty = DecoderLayers(model), DecoderLayers(shaped(model))
    layers.norm = _copy(layers.norm, empty.norm, layers.device)
    layers.unembedding = _copy(layers.unembedding, empty.unembedding, layers.device)
    return layers


def _copy(module: nn.Module, empty: nn.Module, device: torch.device) -> nn.Module:
    for name, value in whole_parameters(module):
        empty.register_parameter(name, nn.Parameter(value.detach().to(device, copy=True), requires_grad=False))
    return empty
