"""`Graphs`: calls of fixed shapes and addresses, on a GPU recorded once as CUDA graphs and replayed from then on.

A small model's layers are hundreds of kernels of microseconds each, and starting them one by one takes longer than
they do. Anywhere but on a GPU the same call runs as it is: the plain twin, which the tests run. Knows nothing of
models and caches. The pattern is PyTorch's own: warmed up on a side stream, captured there, memory from one pool.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UnsupportedModel

# Calls before the recording: libraries make their handles and choose their kernels in the first ones.
WARM_UP = 2


class Graphs:
    """Recorded calls by key. Their memory comes from one pool and goes when this object does."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, tuple[Any, Tensor]] = {}
        self._stream: Any = None
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._recorded)

    def call(self, key: Hashable, function: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `function` returns, read and written where it was at its first call with this key.

        Another call may write over the result, since all share their memory: copy what is kept.

        Raises:
            UnsupportedModel: it does what cannot be recorded, as reading a number back from the device.
        """
        if not recordable(device):
            return function()
        if key not in self._recorded:
            try:
                self._recorded[key] = self._record(function, device)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UnsupportedModel(
                    f"the model's layers cannot be recorded as a CUDA graph, switch graphs off: {first}"
                ) from error
        graph, output = self._recorded[key]
        graph.replay()
        return output

    def _record(self, function: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
        """The graph, which has not run yet, and where it leaves its result."""
        cuda: Any = torch.cuda  # not all of it is typed
        with cuda.device(device):
            if self._stream is None:
                self._stream, self._pool = cuda.Stream(), cuda.graph_pool_handle()
            current = cuda.current_stream()
            self._stream.wait_stream(current)
            with cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    function()
            current.wait_stream(self._stream)
            graph = cuda.CUDAGraph()
            try:
                with cuda.graph(graph, pool=self._pool, stream=self._stream):
                    output = function()
            finally:
                cuda.set_stream(current)  # a capture that fails leaves its own in the place
        return graph, output


def recordable(device: torch.device) -> bool:
    """Whether calls on this device are recorded."""
    return device.type == "cuda"
