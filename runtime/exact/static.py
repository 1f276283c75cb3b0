"""`StaticCache`: keys and values at fixed addresses, and the base's layers run over them in calls of fixed shapes.

A block is padded to the next power of two of rows and attends to the whole buffer, behind a mask made from a position
that lies on the device. So the layers between two depths, a segment, are one call that can be recorded as a CUDA
graph. Rows of padding write keys beyond the text, which no row of the text sees and which the next block overwrites.
Knows no drafting and no model family.
"""

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from runtime.adapter.identity import plain_tensors
from runtime.decoding.cache import KVCache, Through
from runtime.decoding.rows import TreeRows
from runtime.exact.graphs import Graphs

# Positions of the smallest buffer, and those kept free for the padding of a text's last block.
MIN_POSITIONS = 256
ROOM = 16


class StaticCache(KVCache):
    """A `KVCache` of one shape, which only a longer text changes: then it grows, and what was recorded is dropped.

    Shape suffixes: T tokens of a block, W the same padded, C positions that there is room for, D hidden size.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(num_layers, capacity)
        self.graphs = Graphs()
        self._store: Tensor | None = None  # [layers, 2, 1, KV heads, C, head size]
        self._inputs: dict[int, Tensor] = {}  # W -> hidden states [1, W, D] of the block that runs
        self._trees: dict[int, tuple[Tensor, Tensor]] = {}  # W -> positions [1, W] and mask [1, 1, W, C] of a tree
        self._start = torch.empty(0)  # the block's first row in the cache and first position
        self._columns = torch.empty(0)  # 0 to C - 1
        self._places = torch.empty(0)  # rows of the cache that the block writes, [W]
        self._written = 0

    @classmethod
    def from_dynamic(cls, cache: Any, capacity: int) -> "StaticCache":
        """As `KVCache.from_dynamic`."""
        static = cls(len(cache.layers), capacity)
        static.fill(cache, capacity)
        return static

    def fill(self, cache: Any, capacity: int) -> None:
        """Hold what the prompt's own forward left, and nothing of the text before."""
        length = cache.get_seq_length()
        self.crop(0)
        self._reserve(max(capacity, length) + ROOM, cache.layers[0].keys)
        for index, layer in enumerate(cache.layers):
            for buffer, rows in ((self._keys[index], layer.keys), (self._values[index], layer.values)):
                assert buffer is not None
                buffer[:, :, :length] = rows
        self.lengths = [length] * len(cache.layers)
        self._written = length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a block's rows to a layer; called by the base's attention modules.

        Returns:
            All keys and values that there is room for, shape [1, KV heads, C, head size].
        """
        key_buffer, value_buffer = self._keys[layer_idx], self._values[layer_idx]
        assert key_buffer is not None and value_buffer is not None
        return key_buffer.index_copy_(2, self._places, keys), value_buffer.index_copy_(2, self._places, values)

    def crop(self, length: int) -> None:
        """As `KVCache.crop`. Forgotten rows are set to zero: hidden ones still count, times nothing, if not finite."""
        super().crop(length)
        if self._store is not None and self._written > length:
            self._store[..., length : self._written, :].zero_()
            self._written = length

    def run(
        self, through: Through, hidden: Tensor, start: int, stop: int, position: int, tree: TreeRows | None = None
    ) -> Tensor:
        """As `KVCache.run`; the block's rows go after those that each of these layers holds."""
        count, row = hidden.shape[1], self.lengths[start]
        width = 1 << (count - 1).bit_length()
        self._reserve(row + width)
        if width not in self._inputs:
            with torch.inference_mode(False):
                self._inputs[width] = hidden.new_zeros(1, width, hidden.shape[2])
        given = self._inputs[width]
        given[:, :count].copy_(hidden)
        given[:, count:].zero_()
        self._start[0].fill_(row)  # numbers go along with the call: nothing waits for the device
        self._start[1].fill_(position)
        shape = None if tree is None else self._place(tree, width, position)
        segment = partial(self._segment, through, given, start, stop, shape)
        output = self.graphs.call((start, stop, width, tree is None), segment, hidden.device)
        self.lengths[start:stop] = [row + count] * (stop - start)
        self._written = max(self._written, row + width)
        return output[:, :count].clone()

    def _place(self, tree: TreeRows, width: int, position: int) -> tuple[Tensor, Tensor]:
        """Positions and mask of a tree's block, where they stay; rows of padding see what is settled."""
        store = self._store
        assert store is not None
        if width not in self._trees:
            with torch.inference_mode(False):
                steps = torch.zeros(1, width, dtype=torch.int64, device=store.device)
                self._trees[width] = steps, store.new_zeros(1, 1, width, store.shape[4])
        steps, mask = self._trees[width]
        count = len(tree.paths)
        steps[:, :count].copy_(torch.tensor(tree.positions(position)))
        mask.fill_(-torch.inf)
        mask[..., : tree.settled] = 0
        hidden = tree.hidden(store.shape[4], torch.device("cpu"))
        mask[0, 0, :count].copy_(torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf))
        return steps, mask

    def _segment(
        self, through: Through, hidden: Tensor, start: int, stop: int, shape: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The call that is recorded: all that it reads and writes is in tensors that stay, none of it in numbers."""
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        self._places = self._start[0] + steps
        if shape is not None:
            return through(hidden, start, stop, shape[0], self, shape[1])
        unseen = self._columns > self._places[:, None]
        mask = torch.zeros(unseen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(unseen, -torch.inf)
        return through(hidden, start, stop, (self._start[1] + steps)[None], self, mask[None, None])

    def _reserve(self, positions: int, rows: Tensor | None = None) -> None:
        """Make room for so many positions, at least; the next power of two, so that few texts make it grow.

        Args:
            rows: keys of one layer, which tell shape, dtype and device of the first buffer.
        """
        held = 0 if self._store is None else self._store.shape[4]
        if positions <= held:
            return
        size = max(MIN_POSITIONS, 1 << (positions - 1).bit_length())
        like = rows if self._store is None else self._store[0, 0]
        assert like is not None
        num_layers = len(self.lengths)
        with torch.inference_mode(False):  # they outlive the call, and tensors of that mode could not be written later
            store = like.new_zeros(num_layers, 2, *like.shape[:2], size, like.shape[3])
            self._columns = torch.arange(size, device=like.device)
            self._start = torch.zeros(2, dtype=torch.int64, device=like.device)
        if self._store is not None:
            store[..., :held, :] = self._store
        self._store = store
        self._keys = [store[index, 0] for index in range(num_layers)]
        self._values = [store[index, 1] for index in range(num_layers)]
        self._trees.clear()
        self.graphs = Graphs()


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Where the weights lie: what was recorded reads them there."""
    named = chain(model.named_parameters(), model.named_buffers())
    return tuple(tensor.data_ptr() for _, tensor in plain_tensors(named))


def why_not(layers: Iterable[nn.Module]) -> str | None:
    """Why these decoder layers cannot run as segments; None where they can."""
    modules = [module for layer in layers for module in layer.modules()]
    if any(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in modules):
        return "hooks on its layers, such as those that move tensors between devices, would not run"
    devices = {str(parameter.device) for module in modules for parameter in module.parameters(recurse=False)}
    if len(devices) != 1:
        return f"its layers are on several devices ({', '.join(sorted(devices))})"
    return None
