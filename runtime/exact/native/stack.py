"""A run of decoder layers of the Llama kind as one call of our own kernel, no Python between the operations.

Whether the rows have the bits of the model's own layers is the caller's business. Knows no policy and no probe.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.decoding.cache import Block
from runtime.decoding.families import WEIGHINGS, Family
from runtime.exact.native.attend import MAX_SIZE, NO_WINDOW, ORDERS
from runtime.exact.native.library import native_library
from runtime.exact.native.parts import LayerParts, epsilon, is_listened_to
from runtime.exact.native.products import Order
from runtime.exact.native.tables import RotaryTables, table_of

# Of a head, and of the gated part: halves of whole vectors, and what torch's SiLU takes in whole vectors.
HEAD_MULTIPLE, INNER_MULTIPLE = 32, 64
# Columns of the table of layers, as `stack.h` declares them: weights, biases, norms (four each), norms of heads (two),
# the table of angles, the window.
COLUMNS = 16
UNGROUPED = (0, 0, 0, 0)  # of the four products: for few rows torch adds all blocks along K together


class NativeLayers:
    """Decoder layers that run natively.

    Shape suffixes: T tokens of the block, D hidden size, E head size.

    Args:
        parts: of every layer of the model.
        packed: weight and bias (or None) of the Linears of each layer, in the order of `LayerParts.linears`.
        orders: of additions in those Linears, either all by tiles or none.
        order: of additions in attention, and where a window is full, each one of `attend.ORDERS`.
        family: of the model.
        final: the norm above the layers.
        tables: of angles, for the kinds of layers that there are.
        kinds: of the layers, names of `tables`.
        unembedding: the packed one, where that runs in our kernel too, so that any number of rows keep their bits.
    """

    def __init__(
        self,
        parts: Sequence[LayerParts],
        packed: Sequence[Sequence[tuple[Tensor, Tensor | None]]],
        orders: Sequence[Order],
        order: tuple[str, str],
        *,
        family: Family,
        final: Any,
        tables: RotaryTables,
        kinds: Sequence[str],
        unembedding: Any,
    ) -> None:
        first = parts[0]
        self.parts, self.hidden_size = parts, first.hidden
        self.sizes = (*first.heads, first.inner, ORDERS.index(order[0]))
        self.along = (int(orders[0].tiles), *(each.block // 2 for each in orders))
        self.ways = (tables.turned, int(tables.rounds), WEIGHINGS.index(family.weighing), int(first.norms_all_heads))
        self.filled = ORDERS.index(order[1])
        self.floats = (ctypes.c_float * 3)(epsilon(first.all_norms[0]), first.attention.scaling, first.multiplier)
        self.tables = tables
        self.final, self.weighing, self.unembedding = final, family.weighing, unembedding
        self.opened = table_of(first.activation)
        self.norms = [norm for each in parts for norm in each.all_norms]
        self.held = (packed, self.norms)  # the table holds addresses alone
        angles = [tables.kinds.index(kind) if each.rotary else -1 for each, kind in zip(parts, kinds, strict=True)]
        self.table = np.array([_row(*each) for each in zip(parts, packed, angles, strict=True)], dtype=np.int64)

    @classmethod
    def of(
        cls,
        body: Any,
        family: Family,
        unembedding: nn.Module,
        packed: Mapping[tuple[nn.Module, ...], Any],
        attention: Any,
    ) -> "NativeLayers | None":
        """None where the kernels or what they need are missing, or a layer is of another kind or size.

        Args:
            body: of the model: what holds its layers, final norm and rotary module.
            family: of the model.
            packed: by the modules that each stands for: what has a `weight` for our kernel, a `bias` and a `layout`.
            attention: of a block: its `order`, and that of rows whose window is full, `filled`.
        """
        order, filled = attention.order, attention.filled
        if native_library() is None or order is None or is_listened_to(body.rotary_emb) or not _is_known(body.norm):
            return None
        orders: tuple[Order, ...] = ()
        weights: list[list[tuple[Tensor, Tensor | None]]] = []
        alike: set[Any] = set()
        whole: list[LayerParts] = []
        for layer in body.layers:
            parts = LayerParts.of(layer, family)
            if parts is None or any(modules not in packed for modules in parts.linears) or not _is_fit(parts):
                return None
            if parts.window is not None and filled is None:
                return None
            whole.append(parts)
            weights.append([(packed[modules].weight, packed[modules].bias) for modules in parts.linears])
            alike.add((*parts.heads, parts.inner, parts.hidden, epsilon(parts.all_norms[0]), parts.attention.scaling))
            alike.add((parts.multiplier, parts.norms_all_heads, type(parts.activation)))
            orders = tuple(packed[modules].layout.order for modules in parts.linears)
            alike.add(orders)
        kinds = body.config.layer_types if family.rotary_by_layer else [""] * len(whole)
        tables = RotaryTables(body.rotary_emb, sorted(set(kinds)), family.rounds_turns)
        if (
            len(alike) != 3
            or len({each.tiles for each in orders}) != 1
            or body.norm.weight.shape != (whole[0].hidden,)
        ):
            return None
        if tables.turned % HEAD_MULTIPLE or tables.turned > whole[0].heads[2]:
            return None
        more = {"family": family, "final": body.norm, "tables": tables, "kinds": kinds}
        return cls(whole, weights, orders, (order, filled or order), **more, unembedding=packed.get((unembedding,)))

    def __call__(self, blocks: Sequence[Block]) -> list[Tensor] | None:
        """Hidden states [1, T, D] of each block at the depth that all of them go to; appended to their caches.

        None, and the caches as they were, where it cannot be said: some score is not finite.

        Args:
            blocks: of several requests, all from one depth to one other.
        """
        start, stop = blocks[0].start, blocks[0].stop
        held = [block.cache.lengths[start] for block in blocks]
        rows = [block.hidden.shape[1] for block in blocks]
        cosines, sines = self.tables([place for block in blocks for place in block.positions()])
        parts, tables = _parts(blocks, held, rows)
        caches = _places(blocks, start, stop, held, rows)
        if len(blocks) == 1:
            output = blocks[0].hidden.clone(memory_format=torch.contiguous_format)
        else:
            output = torch.cat([block.hidden for block in blocks], 1)
        sizes = (stop - start, len(blocks), sum(rows), output.shape[2], *self.sizes, *self.along, *self.ways)
        sizes += (self.filled, *UNGROUPED)
        library = native_library()
        assert library is not None
        fine = library.specbound_layers(
            self.table[start:].ctypes.data,
            (ctypes.c_int64 * len(parts))(*parts),
            (ctypes.c_int64 * len(caches))(*caches),
            (ctypes.c_int64 * len(sizes))(*sizes),
            self.floats,
            cosines.data_ptr(),
            sines.data_ptr(),
            self.opened.data_ptr(),
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
    own = [
        block.cache.places(start, stop, before + number)
        for block, before, number in zip(blocks, held, rows, strict=True)
    ]
    if len(own) == 1:
        return own[0]
    return [number for layer in range(stop - start) for places in own for number in places[3 * layer : 3 * layer + 3]]


def norms(module: Any, rows: Tensor, weighing: str = WEIGHINGS[0]) -> Tensor:
    """A norm as the kernel computes it in a run, of rows [..., D], bfloat16.

    Args:
        weighing: one of `WEIGHINGS`.
    """
    library = native_library()
    assert library is not None
    rows = rows.contiguous()
    output = torch.empty_like(rows)
    addresses = rows.data_ptr(), module.weight.data_ptr(), output.data_ptr()
    size = rows.shape[-1]
    library.specbound_norms(
        *addresses, rows.numel() // size, size, epsilon(module), WEIGHINGS.index(weighing)
    )  # fmt: skip
    return output


def _is_known(norm: Any) -> bool:
    """Whether a norm is of a kind that the kernel takes, in bfloat16."""
    return epsilon(norm) is not None and norm.weight.dtype == torch.bfloat16 and norm.weight.is_contiguous()


def _is_fit(parts: LayerParts) -> bool:
    """Whether sizes are those that the kernel takes."""
    size = parts.heads[2]
    return (
        size % HEAD_MULTIPLE == 0
        and size <= MAX_SIZE
        and parts.inner % INNER_MULTIPLE == 0
        and all(map(_is_known, parts.all_norms))
        and len({epsilon(norm) for norm in parts.all_norms}) == 1
        and parts.fits_together
    )


def _row(parts: LayerParts, packed: Sequence[tuple[Tensor, Tensor | None]], table: int) -> list[int]:
    """Of the table of layers."""
    weights = [weight.data_ptr() for weight, _ in packed]
    biases = [0 if bias is None else bias.data_ptr() for _, bias in packed]
    norms = [0 if norm is None else norm.weight.data_ptr() for norm in (*parts.norms, *parts.head_norms)]
    row = [*weights, *biases, *norms, table, NO_WINDOW if parts.window is None else parts.window]
    assert len(row) == COLUMNS
    return row
