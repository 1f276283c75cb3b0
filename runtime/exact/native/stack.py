"""A run of decoder layers of the Llama kind as one call of our own kernel, no Python between the operations.

Whether the rows have the bits of the model's own layers is the caller's business. Knows no policy and no probe.
"""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.decoding.cache import Block
from runtime.decoding.families import LlamaParts, is_listened_to
from runtime.exact.native.attend import MAX_SIZE, ORDERS
from runtime.exact.native.library import native_library
from runtime.exact.native.products import Order

# Of a head, and of the gated part: halves of whole vectors, and what torch's SiLU takes in whole vectors.
HEAD_MULTIPLE, INNER_MULTIPLE = 32, 64
# Columns of the table of layers, as `stack.h` declares them: weights, biases, norms (four each), a switch.
COLUMNS = 13


class NativeLayers:
    """Decoder layers that run natively.

    Shape suffixes: T tokens of the block, D hidden size, E head size.

    Args:
        parts: of every layer of the model.
        packed: weight and bias (or None) of the Linears of each layer, in the order of `LlamaParts.linears`.
        orders: of additions in those Linears, either all by tiles or none.
        order: of additions in attention, one of `attend.ORDERS`.
        body: of the model: its rotary module, whose tables depend on the position alone, and its final norm.
        unembeds: whether the unembedding runs in our kernel too, so that any number of rows keep their bits.
    """

    def __init__(
        self,
        parts: Sequence[LlamaParts],
        packed: Sequence[Sequence[tuple[Tensor, Tensor | None]]],
        orders: Sequence[Order],
        order: str,
        body: Any,
        unembeds: bool,
    ) -> None:
        first = parts[0]
        self.sizes = (*_heads(first), _inner(first), ORDERS.index(order))
        self.along = (int(orders[0].tiles), *(each.block // 2 for each in orders))
        self.floats = (ctypes.c_float * 3)(first.norms[0].variance_epsilon, first.attention.scaling, first.multiplier)
        self.frequencies, self.magnitude = body.rotary_emb.inv_freq, body.rotary_emb.attention_scaling
        self.final, self.unembeds = body.norm, unembeds
        self.silu = silu_of_all()
        self.norms = [norm for each in parts for norm in norms_of(each)]
        self.held = (packed, self.norms)  # the table holds addresses alone
        self.table = np.array([_row(*both) for both in zip(parts, packed, strict=True)], dtype=np.int64)

    @classmethod
    def of(
        cls, body: Any, unembedding: nn.Module, packed: Mapping[tuple[nn.Module, ...], Any], order: str | None
    ) -> "NativeLayers | None":
        """None where the kernels or what they need are missing, or a layer is of another kind or size.

        Args:
            body: of the model: what holds its layers, final norm and rotary module.
            packed: by the modules that each stands for: what has a `weight` for our kernel, a `bias` and a `layout`.
        """
        if native_library() is None or order is None or is_listened_to(body.rotary_emb) or not _is_known([body.norm]):
            return None
        orders: tuple[Order, ...] = ()
        weights: list[list[tuple[Tensor, Tensor | None]]] = []
        alike: set[Any] = set()
        whole: list[LlamaParts] = []
        for layer in body.layers:
            parts = LlamaParts.of(layer)
            if parts is None or any(modules not in packed for modules in parts.linears) or not _is_fit(parts):
                return None
            whole.append(parts)
            weights.append([(packed[modules].weight, packed[modules].bias) for modules in parts.linears])
            alike.add((*_heads(parts), _inner(parts), parts.norms[0].variance_epsilon, parts.attention.scaling))
            alike.add(parts.multiplier)
            orders = tuple(packed[modules].layout.order for modules in parts.linears)
            alike.add(orders)
        fit = len(alike) == 3 and len({each.tiles for each in orders}) == 1
        return cls(whole, weights, orders, order, body, (unembedding,) in packed) if fit else None

    def __call__(self, blocks: Sequence[Block]) -> list[Tensor] | None:
        """Hidden states [1, T, D] of each block at the depth that all of them go to; appended to their caches.

        None, and the caches as they were, where it cannot be said: some score is not finite.

        Args:
            blocks: of several requests, all from one depth to one other.
        """
        start, stop = blocks[0].start, blocks[0].stop
        held = [block.cache.lengths[start] for block in blocks]
        rows = [block.hidden.shape[1] for block in blocks]
        positions = [block.positions() for block in blocks]
        cosines, sines = self._tables(positions[0] if len(blocks) == 1 else torch.cat(positions, 1))
        parts, tables = _parts(blocks, held, rows)
        caches = _places(blocks, start, stop, held, rows)
        if len(blocks) == 1:
            output = blocks[0].hidden.clone(memory_format=torch.contiguous_format)
        else:
            output = torch.cat([block.hidden for block in blocks], 1)
        sizes = (stop - start, len(blocks), sum(rows), output.shape[2], *self.sizes, *self.along)
        library = native_library()
        assert library is not None
        fine = library.specbound_layers(
            self.table[start:].ctypes.data,
            (ctypes.c_int64 * len(parts))(*parts),
            (ctypes.c_int64 * len(caches))(*caches),
            (ctypes.c_int64 * 14)(*sizes),
            self.floats,
            cosines.data_ptr(),
            sines.data_ptr(),
            self.silu.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
        )
        del tables  # until here their addresses were in use
        if not fine:
            return None
        for block, before, number in zip(blocks, held, rows, strict=True):
            block.cache.lengths[start:stop] = [before + number] * (stop - start)
        return [output] if len(blocks) == 1 else list(torch.split(output, rows, 1))

    def keep(self, cache: Any, settled: int, places: Sequence[int]) -> None:
        """As `KVCache.keep`: rows of a cache moved up behind the settled ones, the others forgotten."""
        if list(places) != list(range(len(places))):
            held = settled + places[-1] + 1
            buffers = [tensor for index in range(len(cache.lengths)) for tensor in cache.reserve(index, held)]
            _, heads, capacity, size = buffers[0].shape
            library = native_library()
            assert library is not None
            library.specbound_keep(
                (ctypes.c_int64 * len(buffers))(*(tensor.data_ptr() for tensor in buffers)),
                (ctypes.c_int64 * 6)(len(buffers), heads, capacity, 2 * size, settled, len(places)),
                (ctypes.c_int64 * len(places))(*places),
            )
        cache.crop(settled + len(places))

    def _tables(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, T, E] in bfloat16, in the rotary module's own operations."""
        angles = position_ids[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), -1)
        cosines, sines = angles.cos(), angles.sin()
        if self.magnitude != 1.0:
            cosines, sines = cosines * self.magnitude, sines * self.magnitude
        return cosines.to(torch.bfloat16), sines.to(torch.bfloat16)


def _parts(blocks: Sequence[Block], held: Sequence[int], rows: Sequence[int]) -> tuple[list[int], list[Tensor]]:
    """Of each request, what `Part` in `stack.h` has, and the tables of paths that it points to."""
    parts: list[int] = []
    tables: list[Tensor] = []
    for block, before, number in zip(blocks, held, rows, strict=True):
        if block.tree is None:
            parts += number, before, 0, 0
        else:
            tables.append(block.tree.table(before + number))
            parts += number, before, block.tree.settled, tables[-1].data_ptr()
    return parts, tables


def _places(blocks: Sequence[Block], start: int, stop: int, held: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Of each layer and request: where keys and values lie, and for how many rows there is room."""
    places: list[int] = []
    for index in range(start, stop):
        for block, before, number in zip(blocks, held, rows, strict=True):
            assert block.cache.lengths[index] == before
            keys, values = block.cache.reserve(index, before + number)
            places += keys.data_ptr(), values.data_ptr(), keys.shape[2]
    return places


def norms(module: Any, rows: Tensor) -> Tensor:
    """A norm of the Llama kind as the kernel computes it in a run, of rows [..., D], bfloat16."""
    library = native_library()
    assert library is not None
    rows = rows.contiguous()
    output = torch.empty_like(rows)
    addresses = rows.data_ptr(), module.weight.data_ptr(), output.data_ptr()
    size = rows.shape[-1]
    library.specbound_norms(*addresses, rows.numel() // size, size, module.variance_epsilon)
    return output


def _heads(parts: LlamaParts) -> tuple[int, int, int]:
    """Heads of queries, of keys, and the size of each."""
    attention = parts.attention
    size: int = attention.head_dim
    return attention.q_proj.out_features // size, attention.k_proj.out_features // size, size


def _inner(parts: LlamaParts) -> int:
    """Size of the gated part."""
    gate: Any = parts.linears[2][0]
    size: int = gate.out_features
    return size


def norms_of(parts: LlamaParts) -> tuple[Any, ...]:
    """Of the layer, and of its heads where there are such."""
    return (*parts.norms, *(parts.head_norms or ()))


def _is_known(norms: Iterable[Any]) -> bool:
    """Whether norms are of the Llama kind, in bfloat16."""
    return all(
        hasattr(norm, "variance_epsilon") and norm.weight.dtype == torch.bfloat16 and norm.weight.is_contiguous()
        for norm in norms
    )


def _is_fit(parts: LlamaParts) -> bool:
    """Whether sizes are those that the kernel takes."""
    size = _heads(parts)[2]
    norms = norms_of(parts)
    return (
        size % HEAD_MULTIPLE == 0
        and size <= MAX_SIZE
        and _inner(parts) % INNER_MULTIPLE == 0
        and _is_known(norms)
        and len({norm.variance_epsilon for norm in norms}) == 1
    )


def _row(parts: LlamaParts, packed: Sequence[tuple[Tensor, Tensor | None]]) -> list[int]:
    """Of the table of layers."""
    weights = [weight.data_ptr() for weight, _ in packed]
    biases = [0 if bias is None else bias.data_ptr() for _, bias in packed]
    norms = [norm.weight.data_ptr() for norm in norms_of(parts)]
    row = [*weights, *biases, *norms, *[0] * (4 - len(norms)), int(parts.rotary)]
    assert len(row) == COLUMNS
    return row


def silu_of_all() -> Tensor:
    """Torch's SiLU of every bfloat16, by its bits; one more, since the kernel reads words of two."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    opened = functional.silu(bits.view(torch.bfloat16))
    return functional.pad(opened, (0, 1))
