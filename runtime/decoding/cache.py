"""`KVCache`: keys and values of one request, layer by layer, each layer with a length of its own.

Preallocated buffers that grow by whole KV blocks, so that most steps write their rows and copy nothing else. Stands
where transformers' decoder layers expect a `Cache`: they only call `update`. Knows no drafting and no model family.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from runtime.decoding.rows import TreeRows

# Tokens of a KV block, in which buffers grow and memory is counted. A request leaves half of one unused on average, a
# few percent of a usual text; smaller ones would copy short texts more often. Keys of each head begin at whole lines.
BLOCK_TOKENS = 64
# A buffer grows by one part of so many of itself: a row is copied 8 times on average, and read hundreds of times.
GROWTH = 8
# Layers from one depth to another, on hidden states [1, T, D] at given positions [1, T]; what its rows see.
Through = Callable[[Tensor, int, int, Tensor, "KVCache", Tensor | TreeRows | None], Tensor]


def blocks_of(rows: int) -> int:
    """KV blocks that so many rows of keys and values take."""
    return -(-rows // BLOCK_TOKENS)


def grown(held: int, needed: int, most: int) -> int:
    """KV blocks of a cache that has `held` and needs more than these: some beyond, up to `most`."""
    return max(needed, min(held + max(1, held // GROWTH), most))


def first_blocks(rows: int, most: int) -> int:
    """KV blocks to begin with for so many rows: one beside those that hold them, up to those of `most` rows."""
    return min(blocks_of(rows) + 1, blocks_of(most))


def position_ids(position: int, length: int, device: torch.device, tree: TreeRows | None = None) -> Tensor:
    """Positions of a block, shape [1, T], from that of its first token."""
    if tree is not None:
        return torch.tensor([tree.positions(position)], device=device)
    return torch.arange(position, position + length, device=device).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens of one request that shall come from one depth to another.

    Attributes:
        hidden: shape [1, T, D], at depth `start`.
        position: of the first of them; the caller may number positions another way than the cache's rows.
        cache: of the request; new rows are appended.
        tree: what the rows see; None where each sees all that is before it, in the cache and in the block.
        tokens: their ids, for layers that have inputs of their own.
    """

    hidden: Tensor
    start: int
    stop: int
    position: int
    cache: "KVCache"
    tree: TreeRows | None = None
    tokens: Sequence[int] = ()

    def positions(self) -> Sequence[int]:
        """Of all its tokens."""
        if self.tree is not None:
            return self.tree.positions(self.position)
        return range(self.position, self.position + self.hidden.shape[1])


class KVCache:
    """Keys and values, one pair of buffers a layer, each of shape [1, KV heads, capacity, head size].

    No buffer has room for more than `blocks`. While one grows there are two of it: those of a layer at a time.

    Attributes:
        blocks: KV blocks that a buffer takes which is made from now on; more where rows need them.
        most: rows that will ever be needed: no buffer grows beyond their blocks; None where that is not known.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.lengths = [0] * num_layers
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self.blocks = max(1, blocks_of(capacity))
        self.most: int | None = None
        self._addresses: list[int] = []  # of the buffers, where their addresses are known
        self._room = 0  # rows that each of these has room for

    @classmethod
    def from_dynamic(cls, cache: Any, capacity: int) -> "KVCache":
        """Copy what the prompt's own forward left in a transformers `DynamicCache` of batch size 1.

        A layer with a window has dropped its first rows, which nobody will read: zeros stand for them. The last layers
        may have none, where they read those of others.
        """
        layers = [layer for layer in cache.layers if layer.keys is not None]
        kv = cls(len(layers), capacity)
        for index, layer in enumerate(layers):
            dropped = layer.get_seq_length() - layer.keys.shape[2]
            keys, values = layer.keys, layer.values
            if dropped:
                keys, values = (functional.pad(rows, (0, 0, dropped, 0)) for rows in (keys, values))
            kv.update(keys, values, index)
        return kv

    def copy_to(self, cache: Any) -> None:
        """Leave in a transformers `DynamicCache` what plain decoding would have left there."""
        for index, layer in enumerate(cache.layers[: len(self.lengths)]):
            keys, values = self._keys[index], self._values[index]
            assert keys is not None and values is not None
            length = self.lengths[index]
            first = 0
            if layer.is_sliding:
                first = max(0, length - layer.sliding_window + 1)
                layer.cumulative_length = length
            layer.keys = keys[:, :, first:length].clone()
            layer.values = values[:, :, first:length].clone()

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows to a layer; called by the base's attention modules.

        Args:
            keys, values: shape [1, KV heads, new rows, head size].
            layer_idx: which layer.

        Returns:
            All keys and values of that layer so far, views of shape [1, KV heads, length, head size].
        """
        start = self.lengths[layer_idx]
        end = start + keys.shape[2]
        key_buffer = self._grown(self._keys[layer_idx], keys, start, end)
        value_buffer = self._grown(self._values[layer_idx], values, start, end)
        key_buffer.narrow(2, start, end - start).copy_(keys)
        value_buffer.narrow(2, start, end - start).copy_(values)
        self._hold(layer_idx, key_buffer, value_buffer)
        self.lengths[layer_idx] = end
        return key_buffer.narrow(2, 0, end), value_buffer.narrow(2, 0, end)

    def reserve(self, layer_idx: int, length: int) -> tuple[Tensor, Tensor]:
        """A layer's buffers of keys and values, [1, KV heads, capacity, head size], with room for `length` rows."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        assert keys is not None and values is not None
        held = self.lengths[layer_idx]
        if length > keys.shape[2]:
            keys, values = (self._grown(buffer, buffer, held, length) for buffer in (keys, values))
            self._hold(layer_idx, keys, values)
        return keys, values

    def places(self, start: int, stop: int, length: int) -> list[int]:
        """Of layers `start` to `stop - 1`, with room for `length` rows: addresses of keys and values, capacity."""
        assert stop <= len(self.lengths) and len(set(self.lengths[start:stop])) == 1
        if not self._addresses or length > self._room:
            buffers = [self.reserve(index, length) for index in range(len(self.lengths))]
            self._addresses = [
                number for keys, values in buffers for number in (keys.data_ptr(), values.data_ptr(), keys.shape[2])
            ]
            self._room = min(keys.shape[2] for keys, _ in buffers)
        return self._addresses[3 * start : 3 * stop]

    def _hold(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Set a layer's buffers."""
        if keys is not self._keys[layer_idx]:
            self._addresses = []
        self._keys[layer_idx], self._values[layer_idx] = keys, values

    def run(
        self, through: Through, hidden: Tensor, start: int, stop: int, position: int, tree: TreeRows | None = None
    ) -> Tensor:
        """Layers `start` to `stop - 1` on a block, their new rows appended here.

        Args:
            through: the base's layers.
            hidden: shape [1, T, D], at depth `start`.
            position: of the block's first token; the caller may number positions another way than the cache's rows.
            tree: as `DecoderLayers.run` takes it.

        Returns:
            Shape [1, T, D], at depth `stop`.
        """
        positions = position_ids(position, hidden.shape[1], hidden.device, tree)
        return through(hidden, start, stop, positions, self, tree)

    def rows(self, layer_idx: int, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer from row `start` on."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        assert keys is not None and values is not None
        return keys[:, :, start : self.lengths[layer_idx]], values[:, :, start : self.lengths[layer_idx]]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows held by a layer."""
        return self.lengths[layer_idx]

    def crop(self, length: int) -> None:
        """Forget every row from `length` on, in every layer; a layer that holds fewer keeps what it has."""
        self.lengths = [min(length, held) for held in self.lengths]

    def keep(self, settled: int, places: Sequence[int]) -> None:
        """Keep the first `settled` rows of every layer and, of those behind them, the ones at `places`, in order.

        Args:
            places: ascending, counted from `settled` on; every layer holds them.
        """
        moved = [(place, index) for index, place in enumerate(places) if place != index]
        if moved:
            old = torch.tensor([settled + place for place, _ in moved])
            start, stop = settled + moved[0][1], settled + len(places)
            for buffer in (*self._keys, *self._values):
                assert buffer is not None
                buffer[:, :, start:stop] = buffer.index_select(2, old.to(buffer.device))
        self.crop(settled + len(places))

    def _grown(self, buffer: Tensor | None, rows: Tensor, used: int, needed: int) -> Tensor:
        """A buffer that holds at least `needed` rows, with the first `used` rows of `buffer` kept."""
        if buffer is not None and needed <= buffer.shape[2]:
            return buffer
        blocks = blocks_of(needed)
        if blocks > self.blocks:
            self.blocks = grown(self.blocks, blocks, sys.maxsize if self.most is None else blocks_of(self.most))
        size = self.blocks * BLOCK_TOKENS
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            larger = torch.empty(*rows.shape[:2], size, rows.shape[3], dtype=rows.dtype, device=rows.device)
        if buffer is not None:
            larger[:, :, :used] = buffer[:, :, :used]
        return larger
