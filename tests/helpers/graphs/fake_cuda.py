"""CUDA graphs without a GPU: operations are written down with the memory they used, and done again without Python.

What makes a recording wrong on a GPU makes it wrong here: a number that was read while recording stays as it was,
memory that was moved is not followed, a result is written over by the next replay, and whatever reads a number back
from the device or brings one there cannot be recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import runtime.exact.graphs

FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "is_nonzero", "nonzero", "equal")


class Tape(TorchDispatchMode):
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.made: list[torch.Tensor] = []
        self.pool: list[Tape] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it and write it down; tensors as aliases of their memory, which do not follow what is moved."""
        if func._schema.name.removeprefix("aten::") in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func._schema.name}")
        output = func(*args, **(kwargs or {}))
        self.calls.append(tree_map_only(torch.Tensor, torch.Tensor.detach, (func, args, kwargs or {}, output)))
        if all(returned.alias_info is None for returned in func._schema.returns):
            self.made += [leaf for leaf in tree_leaves(self.calls[-1][3]) if isinstance(leaf, torch.Tensor)]
        return output

    @torch.inference_mode()  # a GPU does not ask either in which mode its memory was allocated
    def replay(self) -> None:
        """The same again, into the same memory; what the others of the pool left there is lost."""
        self.replays += 1
        for other in self.pool:
            if other is not self:
                for tensor in other.made:
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)
        for func, args, kwargs, output in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """In the place of `torch.cuda.Stream`."""

    def wait_stream(self, other: Any) -> None:
        """All streams are one here."""
        assert isinstance(other, Stream)


@contextmanager
def capture(graph: Tape, *, pool: list[Tape], stream: Stream) -> Iterator[None]:
    """In the place of `torch.cuda.graph`."""
    assert isinstance(stream, Stream)
    pool.append(graph)
    graph.pool = pool
    with graph:
        yield


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `runtime.exact.graphs` record on the CPU."""
    monkeypatch.setattr(runtime.exact.graphs, "recordable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", list)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", capture)
