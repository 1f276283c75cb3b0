"""How a block of new tokens is computed: with the bits of one-token decoding, or batched.

A block's rows equal one-by-one rows only where every operation gives a row the same bits whatever else is in the
call. Attention and Linear kernels choose their order of additions by shape, so they are run row by row where
that matters. Knows nothing of drafting.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from runtime.attention import block_attention

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExecutionPolicy:
    """Which operations of a block run one row at a time.

    Attributes:
        rowwise_attention: attention of each query row on its own keys.
        rowwise_linears: weight shapes of the Linears that run one row at a time; None for all of them.
    """

    rowwise_attention: bool
    rowwise_linears: frozenset[Shape] | None

    @classmethod
    def rowwise(cls) -> "ExecutionPolicy":
        """Everything that may depend on the number of rows runs row by row."""
        return cls(rowwise_attention=True, rowwise_linears=None)

    @classmethod
    def batched(cls) -> "ExecutionPolicy":
        """Nothing runs row by row."""
        return cls(rowwise_attention=False, rowwise_linears=frozenset())

    def is_rowwise(self, module: nn.Module) -> bool:
        """Whether this Linear runs one row at a time."""
        return self.rowwise_linears is None or tuple(module.weight.shape) in self.rowwise_linears  # type: ignore[arg-type]


@contextmanager
def execution(model: PreTrainedModel, policy: ExecutionPolicy) -> Iterator[None]:
    """While open, `model` computes blocks by `policy`; afterwards its modules are as they were."""
    patched: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []
    with block_attention(model, rowwise=policy.rowwise_attention):
        try:
            for module in linears(model):
                if policy.is_rowwise(module):
                    hooked = module.__dict__.get("forward")  # another library's hook: it runs on each row
                    patched.append((module, hooked))
                    module.__dict__["forward"] = partial(_rows, hooked or partial(type(module).forward, module))
            yield
        finally:
            for module, hooked in patched:
                if hooked is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = hooked


def linears(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that multiply by a weight matrix, in the model's order."""
    return [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]


def _rows(forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`forward` on each row [1, 1, D] of a block [1, T, D], or [1, D] of [T, D], joined again."""
    rows = hidden.shape[-2]
    if rows == 1:
        return forward(hidden, *args, **kwargs)
    parts = torch.split(hidden, 1, dim=-2)
    return torch.cat([forward(part, *args, **kwargs) for part in parts], dim=-2)
