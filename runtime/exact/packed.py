"""Linears that run in our own kernels or in oneDNN's, in bfloat16 from weights that are packed once.

Linears that read the same input (query, key and value; gate and up) run as one. Whether the rows have the bits of
the model's own Linears is the probe's business; all of this is for CPUs. Knows no policy and no probe.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.decoding.families import own_attentions
from runtime.errors import UnsupportedModel, one_line
from runtime.exact.fingerprint import is_whole, sums, words
from runtime.exact.native.layout import Layout, has_onednn, layout_of
from runtime.exact.native.products import has_products
from runtime.exact.native.singles import is_fit

logger = logging.getLogger(__name__)

# Stock takes products of up to 4,096 weights past oneDNN and adds in another order: bits then differ, if seldom.
MIN_WEIGHTS = 2**14
# Packed weights are copies, since prompts run on the model's own: at most this part of the memory that is free.
MEMORY_SHARE = 0.25

Forward = Callable[..., Tensor]


class JointLinear:
    """One Linear, or several that read the same input, as one packed multiplication.

    Args:
        modules: in the order of their outputs.
    """

    def __init__(self, modules: Sequence[nn.Linear], layout: Layout) -> None:
        self.modules: tuple[nn.Module, ...] = tuple(modules)
        self.layout = layout
        self.sizes = [module.weight.shape[0] for module in modules]
        self.shape = _shape(modules)
        self.weight = layout.pack([module.weight.detach() for module in modules])
        self.bias = None if modules[0].bias is None else torch.cat([module.bias.detach() for module in modules])

    @property
    def copied(self) -> list[Tensor]:
        """What it has copies of: all that it reads, or, where weights are read where they lie, biases alone."""
        held = _held([self.modules])
        return held if self.layout.copies else [tensor for tensor in held if tensor.dim() == 1]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Outputs of all modules, shape [..., sum of their sizes], of hidden states [..., in]."""
        return self.layout.multiply(hidden, self.weight, self.bias, self.shape[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle of a Linear that runs packed runs from its own weights: the layout cannot be copied."""
        (module,) = self.modules
        return partial, (type(module).forward, module)

    def forwards(self, call: Forward) -> list[Forward]:
        """A `forward` for each module, of which one call of `call` (this object, maybe in rows) serves all."""
        if len(self.modules) == 1:
            return [call]
        shared = _OneCall(call, self.sizes)
        return [partial(shared.part, index) for index in range(len(self.modules))]


class _OneCall:
    """One multiplication for several Linears that read the same tensor, whichever of them is called first."""

    def __init__(self, call: Forward, sizes: Sequence[int]) -> None:
        self.call, self.sizes = call, sizes
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, hidden: Tensor) -> Tensor:
        """The output of one Linear; each is handed out once, and nothing is kept after the last."""
        if hidden is not self._input or index not in self._parts:
            self._input = hidden
            self._parts = dict(enumerate(torch.split_with_sizes(self.call(hidden), self.sizes, dim=-1)))
        output = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return output


class PackedLinears:
    """The Linears of a model, packed. `current` says whether they still are the model's."""

    def __init__(self, groups: Sequence[Sequence[nn.Linear]]) -> None:
        layouts = {_shape(group): layout_of(group[0], _shape(group)[0]) for group in groups}
        chosen = [(group, layouts[_shape(group)]) for group in groups]
        self.joint = [JointLinear(group, layout) for group, layout in chosen if layout is not None]
        held = _held([joint.modules for joint in self.joint])
        self._lie = [(tensor.data_ptr(), tensor._version) for tensor in held]
        copied = [tensor for joint in self.joint for tensor in joint.copied]
        self._words = [part for tensor in copied for part in words(tensor)]
        self._sums = sums(self._words)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "PackedLinears | None":
        """All Linears of the model that can be packed; None where there are none, or no room for a copy."""
        groups = packable(model)
        copied = [module for group in groups for module in group if module.weight.dtype == torch.bfloat16]
        needed = sum(module.weight.nbytes for module in copied)
        free = free_memory()
        if not groups:
            return None
        if needed > MEMORY_SHARE * free:
            logger.info("nothing is packed: it would take %d of %d free MiB", needed >> 20, free >> 20)
            return None
        return cls(groups)

    def current(self) -> bool:
        """Whether the model's weights are where they were, and what was copied of them what it was, to the bit.

        A write through `.data` changes no pointer and no version, so all bits of what was copied are read.
        """
        held = _held([joint.modules for joint in self.joint])
        return [(tensor.data_ptr(), tensor._version) for tensor in held] == self._lie and torch.equal(
            sums(self._words), self._sums
        )


def _dtype(module: nn.Module) -> torch.dtype:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.dtype


def _shape(modules: Sequence[nn.Linear]) -> tuple[int, int]:
    """Of the weights of several Linears under one another."""
    return sum(module.weight.shape[0] for module in modules), modules[0].weight.shape[1]


def pack_in_place(modules: Iterable[nn.Module]) -> None:
    """Let these Linears run from packed copies of their weights, where that can be; again after they changed."""
    for module in modules:
        if isinstance(module, nn.Linear):
            module.__dict__.pop("forward", None)
            if module.weight.dtype == torch.bfloat16 and _is_packable(module) and has_onednn():
                layout = layout_of(module, module.weight.shape[0])
                assert layout is not None
                module.__dict__["forward"] = JointLinear([module], layout)


def packable(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """The model's Linears that can be packed, those that read the same input together."""
    if model.device.type != "cpu" or not (has_onednn() or has_products()):
        return []
    alone = {inner for module in own_attentions(model) for inner in module.modules()}
    groups = [group for group in _by_input(model) if all(map(_is_packable, group)) and alone.isdisjoint(group)]
    dtypes = {_dtype(module) for group in groups for module in group}
    if len(dtypes) > 1:  # LoRA in float32 on a base in bfloat16, say: layouts and policies go by shape
        return [group for group in groups if {_dtype(module) for module in group} == {torch.bfloat16}]
    return groups


def _is_packable(module: nn.Module) -> bool:
    """A Linear of torch's own class and forward, its weight a plain tensor without gaps, and large enough."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and (module.bias is None or (module.bias.dtype == module.weight.dtype and is_whole(module.bias)))
        and (module.bias is None or module.bias.shape == module.weight.shape[:1])
        and is_whole(module.weight)
        and _has_kernel(module.weight)
        and module.weight.device.type == "cpu"
        and not module.weight.is_inference()
        and module.weight.numel() >= MIN_WEIGHTS
    )


def _has_kernel(weight: Tensor) -> bool:
    """Whether there may be one for a weight of this dtype, shape and place."""
    if weight.dtype == torch.float32:
        return has_products() and is_fit(weight)
    return weight.dtype == torch.bfloat16 and has_onednn()


@torch.no_grad()
def _by_input(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """The Linears in the order of one forward; those called in a row with the very same tensor are together."""
    calls: list[tuple[nn.Linear, Tensor]] = []
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((cast(nn.Linear, module), args[0]))

    hooks = [module.register_forward_pre_hook(record) for module in linears]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    except Exception as error:  # of the model's own forward: stock's loop will meet it as well
        raise UnsupportedModel(f"its own forward could not be probed: {one_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[nn.Linear]] = []
    last: Tensor | None = None
    for module, given in calls:
        if given is last and (module.bias is None) == (groups[-1][0].bias is None):
            groups[-1].append(module)
        else:
            groups.append([module])
        last = given
    return groups if len(calls) == len({module for module, _ in calls}) else []  # one called twice fits no group


def _held(groups: Sequence[Sequence[Any]]) -> list[Tensor]:
    """The weights and biases of Linears."""
    held = [tensor for group in groups for module in group for tensor in (module.weight, module.bias)]
    return [tensor for tensor in held if tensor is not None]


def free_memory() -> int:
    """Bytes that can be had; 0 where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration, ValueError):
        return 0
