"""`PromptLayers`: the layers of a prompt's own forward in our kernel, with the same bits.

Attention stays with torch where its order is not known. Products of many rows, norms and what lies between them take a
third to a half of torch's time. Whether every bit is kept is the probe's business, and for how many rows that of
`PromptOrders`. Knows no policy and no probe.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.decoding.families import CACHE
from runtime.exact.native.library import native_library
from runtime.exact.native.prefix import Prefixes
from runtime.exact.native.products import Order
from runtime.exact.native.prompt_attention import PromptAttention
from runtime.exact.native.prompt_orders import PromptOrders
from runtime.exact.native.stack import NativeLayers

# Torch shares out operations number by number to threads, so many to each at least, and takes so many at once.
GRAIN, VECTORS = 32768, 64


class NotInParts(Exception):
    """Some number is not finite: the prompt is to be read whole."""


class PromptLayers:
    """What layers do to a prompt of one request.

    Shape suffixes: T tokens of the prompt, D hidden size, E head size, R numbers of a head that are turned.

    Args:
        layers: of the model.
        native: what runs blocks of few rows; its packed weights are used.
    """

    def __init__(self, layers: Sequence[nn.Module], native: NativeLayers) -> None:
        self.layers, self.native = layers, native
        attend, output, gate_up, down = native.parts[0].linears
        # Queries may have another shape than keys and values, which have the same.
        one_each = [attend[0], attend[-1], output[0], gate_up[0], down[0]]
        self.orders = PromptOrders(one_each, bool(native.along[0]))
        self.steady = is_steady(native.parts[0].activation, native.opened)
        scaling = native.parts[0].attention.scaling
        alike = all((p.heads, p.attention.scaling) == (native.parts[0].heads, scaling) for p in native.parts)
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        self.attention = PromptAttention(native.parts[0].heads, scaling, sdpa, in_all=alike)
        self.prefixes = Prefixes(self.attention, self.orders)
        self._windows = any(parts.window is not None for parts in native.parts)
        self._whole = 0
        self._room: Tensor | None = None  # for what lies between products, the same for all layers of a prompt
        self._given: Tensor | None = None
        self._angles: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def common(self, one: int, other: int, alike: int) -> int:
        """Rows that prompts of so many tokens, so many of them alike, have in common to the bit; see `Prefixes`."""
        if self._windows or not (self._activates(one) and self._activates(other)):
            return 0
        return self.prefixes.common(one, other, alike)

    def in_parts(self, length: int) -> bool:
        """Whether a prompt of so many tokens may be read in parts, each row being computed here, and alone."""
        known = not self._windows and self._activates(length) and self.orders(length) is not None
        return known and self.attention.knows(length)

    @contextmanager
    def reading(self, whole: int = 0) -> Iterator[None]:
        """While open, the model's forward of a prompt runs its layers natively where their orders are known.

        Args:
            whole: tokens of a prompt whose beginning is in the cache already; the forward is given the others.
        """
        self._whole = whole
        unembedding = None if self.native.unembedding is None else self.native.unembedding.modules[0]
        if unembedding is not None and "forward" in unembedding.__dict__:  # a hook of others
            unembedding = None
        try:
            for index, layer in enumerate(self.layers):
                layer.__dict__["forward"] = partial(self._forward, index)
            if unembedding is not None:
                unembedding.__dict__["forward"] = self._unembed
            yield
        finally:
            for layer in (*self.layers, *([] if unembedding is None else [unembedding])):
                layer.__dict__.pop("forward", None)
            self._given, self._room, self._whole = None, None, 0

    def keeps_bits(self, model: Any, token_ids: Tensor, lengths: Sequence[int]) -> bool:
        """Whether prompts run here, and leave the same keys, values and logits as in the model's own layers.

        Args:
            token_ids: shape [1, N], repeated for longer prompts.
            lengths: of the prompts, in tokens.
        """
        for length in lengths:
            if self.orders(length) is None:
                return False
            ids = token_ids.repeat(1, -(-length // token_ids.shape[1]))[:, :length]
            found = []
            for way in (nullcontext(), self.reading()):
                cache = DynamicCache(config=model.config)
                with way:
                    logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
                layers: list[Any] = cache.layers
                found.append([logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))])
            if not all(map(torch.equal, *found)):
                return False
        return True

    def _forward(self, index: int, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        """As the layer's own `forward`, [1, T, D] to [1, T, D]."""
        rows, cache = hidden_states.shape[1], given.get(CACHE)
        orders, whole = None, self._whole or rows
        if not args and cache is not None and hidden_states.shape[0] == 1 and whole > 1 and self._activates(whole):
            orders = self.orders(whole)
        if orders is None or cache is None:
            layer: Any = self.layers[index]
            return type(layer).forward(layer, hidden_states, *args, **given)
        module = self.native.parts[index].attention
        query, keys, values = self._before(index, orders, hidden_states, *given["position_embeddings"])
        keys, values = cache.update(keys, values, module.layer_idx)
        attended = self._attend(index, query, keys, values, given.get("attention_mask"), whole)
        return self._after(index, orders, attended, hidden_states)

    def _attend(
        self, index: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, whole: int
    ) -> Tensor:
        """Of rows of a prompt of so many tokens, the last that are there: [1, H, T, E] to [1, T, H, E].

        Raises:
            NotInParts: only our kernel attends while further tokens are to come, and it cannot.
        """
        parts, rows = self.native.parts[index], query.shape[2]
        mask = mask if whole == rows else None
        if mask is None and self.attention.knows(whole):
            attended = self.attention(query, keys, values, whole)
            if attended is not None:
                return attended
        if keys.shape[2] < whole:
            raise NotInParts
        if whole > rows:  # torch's call for the whole prompt, since its blocks depend on the number of queries
            given, (_, heads, _, size) = query, query.shape
            query = query.new_zeros(1, whole, heads, size).transpose(1, 2)
            query[:, :, whole - rows :] = given
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        stock: Tensor = attend(
            parts.attention, query, keys, values, mask, dropout=0.0, scaling=parts.attention.scaling
        )[0]
        return stock[:, whole - rows :]

    def _unembed(self, normed: Tensor) -> Tensor:
        """As the unembedding's own `forward`: in our kernel where one row is asked for, as in decoding."""
        packed = self.native.unembedding
        module: Any = packed.modules[0]
        logits: Tensor = packed(normed) if normed.shape[:-1].numel() == 1 else type(module).forward(module, normed)
        return logits

    def _activates(self, rows: int) -> bool:
        """Whether torch activates so many rows as the table does: what fills no vector of a thread may differ."""
        numbers = rows * self.native.parts[0].inner
        threads = min(torch.get_num_threads(), -(-numbers // GRAIN))
        return self.steady or -(-numbers // threads) % VECTORS == 0

    def _before(
        self, index: int, orders: tuple[Order, ...], hidden: Tensor, cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [1, H, T, E], and keys and values [1, G, T, E], turned to their positions; tables are [1, T, R]."""
        rows = hidden.shape[1]
        queries, shared, size = self.native.parts[index].heads
        if self._given is not cosines:
            self._angles = cosines.float().contiguous(), sines.float().contiguous()
            self._given = cosines
        hidden = hidden.contiguous()
        heads = hidden.new_empty((1, rows, queries + 2 * shared, size))
        keys, values = hidden.new_empty((2, 1, shared, rows, size)).unbind()
        library = native_library()
        assert library is not None
        library.specbound_before(
            self.native.table[index:].ctypes.data,
            self._sizes(rows, orders),
            self.native.floats,
            *(tensor.data_ptr() for tensor in (*self._angles, hidden, heads, keys, values, self._space(rows))),
            torch.get_num_threads(),
        )
        return heads[:, :, :queries].transpose(1, 2), keys, values

    def _after(self, index: int, orders: tuple[Order, ...], attended: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states [1, T, D] one layer further, from what was attended, [1, T, H, E]."""
        output = hidden.clone(memory_format=torch.contiguous_format)
        attended = attended.contiguous()
        library = native_library()
        assert library is not None
        library.specbound_after(
            self.native.table[index:].ctypes.data,
            self._sizes(hidden.shape[1], orders),
            self.native.floats,
            *(tensor.data_ptr() for tensor in (self.native.opened, attended, output, self._space(hidden.shape[1]))),
            torch.get_num_threads(),
        )
        return output

    def _space(self, rows: int) -> Tensor:
        """Two hidden states and the gated part of each row."""
        numbers = rows * (2 * self.native.hidden_size + self.native.parts[0].inner)
        if self._room is None or self._room.numel() < numbers:
            self._room = torch.empty(numbers, dtype=torch.bfloat16)
        return self._room

    def _sizes(self, rows: int, orders: tuple[Order, ...]) -> Any:
        """As `NativeLayers` gives them, of one layer and one request, and the block of keys and values."""
        native, (queries, keys, *others) = self.native, orders
        own = queries, *others
        blocks, groups = (each.block // 2 for each in own), (each.group // 2 for each in own)
        along = queries.tiles, *blocks, *native.ways, native.filled, *groups, keys.block // 2, keys.group // 2
        sizes = (1, 1, rows, native.hidden_size, *native.sizes, *along)
        return (ctypes.c_int64 * len(sizes))(*sizes)


def is_steady(activation: nn.Module, table: Tensor) -> bool:
    """Whether torch gives every number the same activation outside of vectors, too."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    apart = activation(bits.repeat_interleave(2)[::2])
    return bool(((apart == table[:-1]) | (apart.isnan() & table[:-1].isnan())).all())
