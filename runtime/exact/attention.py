"""`BlockAttention`: attention for a block of new tokens, as plain decoding would have computed each of them.

Registered with transformers' attention interface around the implementation the model already uses. `rowwise` takes
one query row at a time, on exactly the keys that row may see: the same call that one-token decoding makes, so the same
bits. `native` is our own kernel, in one of the orders of addition that it knows. `grouped` gives several rows to one
call of torch's kernel, as heads of one query each, which on some CPUs keeps every bit too. `batched` makes one call
with a causal mask: faster, not always the same bits. Knows nothing of models, caches or drafting.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.decoding.families import family_of, text_decoder
from runtime.decoding.rows import TreeRows
from runtime.errors import UnsupportedModel
from runtime.exact.native.attend import ORDERS, SINGLES, attend, can_attend

SUPPORTED = ("eager", "sdpa")
# How a block attends; cheapest first.
NATIVE_KINDS = tuple(f"native_{order}" for order in (*ORDERS, SINGLES))
# Also of rows whose window is full, in the second order: these are another call of torch's kernel.
WINDOW_KINDS = tuple(f"native_{order}_{filled}" for order in ORDERS for filled in ORDERS)
KINDS = ("batched", *WINDOW_KINDS, *NATIVE_KINDS, "grouped", "rowwise")
# Keys that the CPU's kernels take in one vector. Hidden keys after a row's own add nothing, but where they fill up the
# vector in which the row's own keys end, these are added up in another order.
VECTOR = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
MASKS = 4  # kept, so that all layers of a block share them
AttentionOutput = tuple[Tensor, Any]


def is_native(kind: str) -> bool:
    """Whether a kind of attention is our own kernel's."""
    return kind.startswith("native_")


class BlockAttention:
    """One kind of block attention around one implementation of transformers.

    Shape suffixes: T rows of the block, H query heads, G heads of keys and values, E head size, S tokens so far.

    Args:
        kind: one of `KINDS`; eager attention goes row by row in all but `batched`.
        stock: `eager` or `sdpa`.
        masked: one row alone gets a mask that hides nothing; then all kinds go row by row.
    """

    def __init__(self, kind: str, stock: str, *, masked: bool = False) -> None:
        self.masked = masked and kind != "batched"
        self.kind = "rowwise" if self.masked or (stock == "eager" and kind != "batched") else kind
        orders = self.kind.split("_")[1:]
        self.order = orders[0] if orders else None
        self.filled = orders[1] if len(orders) > 1 else None
        self.stock = stock
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | TreeRows | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> AttentionOutput:
        """Row t of T on the first S - T + t + 1 keys, or on those that a mask to be added or its path leaves.

        Args:
            query: shape [1, H, T, E].
            key, value: shape [1, G, S, E].
            attention_mask: to be added, or what rows see that do not follow one another.

        Returns:
            Shape [1, T, H, E], and None, as transformers' own functions.
        """
        mask = attention_mask  # some layers give it by that name
        tree = mask if isinstance(mask, TreeRows) else None
        # Qwen2-MoE leaves it to masks and caches: its layers know, and do not say.
        window: int | None = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
        full = window is not None and key.shape[2] >= window
        known = self.order if not full or self.filled is not None else None
        if known is not None and not isinstance(mask, Tensor) and can_attend(query, key, value, known):
            output = attend(query, key, value, scaling, known, tree, window, self.filled)
            if output is not None:
                return output, None
        if self.masked or full:
            return self.in_window(window or key.shape[2], module, query, key, value, tree, scaling, **kwargs), None
        stock = _stock_attention(self.stock, module)
        if self.kind == "batched" or (query.shape[2] == 1 and tree is None):
            if not isinstance(mask, Tensor) and (query.shape[2] > 1 or tree is not None):
                mask = _mask(query, key, tree, added=self.stock == "eager")
            return stock(module, query, key, value, mask, scaling=scaling, **kwargs)
        if self.kind == "grouped" and tree is None:
            return self.in_groups(query, key, value, scaling).transpose(1, 2).contiguous(), None
        if self.stock == "sdpa" and query.device.type == "cpu":
            return in_rows(query, key, value, scaling, tree).transpose(1, 2).contiguous(), None
        rows = [
            stock(module, row, keys, values, None, scaling=scaling, **kwargs)[0]
            for row, keys, values in _rows(query, key, value, tree)
        ]
        return torch.cat(rows, dim=1), None

    def in_window(
        self,
        window: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tree: TreeRows | None,
        scaling: float | None,
        **kwargs: Any,
    ) -> Tensor:
        """As a call, [1, T, H, E], of a layer with a window: each row on the last keys of those that it sees.

        Transformers gives sdpa a mask, with nothing hidden, from the token on that fills the window; then the kernel
        is another one. Some models give it one for every token.
        """
        rows = []
        for row, keys, values in _rows(query, key, value, tree):
            last = keys[:, :, -window:], values[:, :, -window:]
            masked = self.stock == "sdpa" and (self.masked or keys.shape[2] >= window)
            shape = (1, 1, 1, last[0].shape[2])
            mask = torch.ones(shape, dtype=torch.bool, device=query.device) if masked else None
            rows.append(_stock_attention(self.stock, module)(module, row, *last, mask, scaling=scaling, **kwargs)[0])
        return torch.cat(rows, dim=1)

    def in_groups(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """As a call, [1, H, T, E] and no mask: rows whose keys end in the same vector go together."""
        num_heads, num_rows, size = query.shape[1:]
        num_shared, num_keys = keys.shape[1], keys.shape[2]
        attended = []
        row = 0
        while row < num_rows:
            seen = num_keys - num_rows + row + 1
            end = min(num_keys, seen - seen % VECTOR + VECTOR - 1)
            rows = end - seen + 1
            part = query[:, :, row : row + rows].reshape(num_shared, -1, 1, size)
            own_keys = keys[0, :, None, :end].expand(-1, part.shape[1], -1, -1)
            own_values = values[0, :, None, :end].expand(-1, part.shape[1], -1, -1)
            mask = None if rows == 1 else self._hidden(seen, rows, num_heads // num_shared, query)
            output = functional.scaled_dot_product_attention(part, own_keys, own_values, attn_mask=mask, scale=scaling)
            attended.append(output.reshape(1, num_heads, rows, size))
            row += rows
        return attended[0] if len(attended) == 1 else torch.cat(attended, 2)

    def _hidden(self, first: int, rows: int, times: int, like: Tensor) -> Tensor:
        """Hides all but the first `first + r` keys from row r, shape [1, times * rows, 1, keys]."""
        mask = self._masks.get((first, rows, times))
        if mask is None or mask.dtype != like.dtype:
            seen = torch.ones(rows, first + rows - 1, dtype=torch.bool, device=like.device).tril(first - 1)
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
            mask = mask.repeat(times, 1)[None, :, None]
            if len(self._masks) == MASKS:
                self._masks.clear()
            self._masks[first, rows, times] = mask
        return mask


def in_rows(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, tree: TreeRows | None = None
) -> Tensor:
    """Torch's kernel on one row at a time, [1, H, T, E]; heads that share keys get them once for all rows."""
    shared = query.shape[1] // keys.shape[1]
    if shared > 1:
        keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    attend = functional.scaled_dot_product_attention
    return torch.cat([attend(*row, scale=scaling) for row in _rows(query, keys, values, tree)], 2)


def implementation_for(model: PreTrainedModel) -> str:
    """What to load a model with, so that its attention is supported; some classes have no sdpa."""
    return f"attn_implementation={'sdpa' if text_decoder(model)._supports_sdpa else 'eager'!r}"


@contextmanager
def block_attention(model: PreTrainedModel, kind: str) -> Iterator[BlockAttention]:
    """While open, the model's attention modules take blocks of new tokens without a mask.

    Args:
        kind: one of `KINDS`.

    Raises:
        UnsupportedModel: where the model uses an implementation other than eager or sdpa.
    """
    config = model.config.get_text_config()  # towers attend in their own way
    stock = config._attn_implementation
    if stock not in SUPPORTED:
        raise UnsupportedModel(
            f"attention implementation {stock!r} is not supported: load the model with {implementation_for(model)}"
        )
    family = family_of(model.config)
    attention = BlockAttention(kind, stock, masked=family.masked)
    if family.attention is not None:  # its modules take rows in a way of their own
        yield attention
        return
    name = f"specbound_{kind}_{stock}_{id(attention)}"
    ALL_ATTENTION_FUNCTIONS[name] = attention
    config._attn_implementation = name
    try:
        yield attention
    finally:
        config._attn_implementation = stock
        ALL_ATTENTION_FUNCTIONS.pop(name)


def _rows(
    query: Tensor, keys: Tensor, values: Tensor, tree: TreeRows | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each row of the block with the keys and values that it sees."""
    num_rows, num_keys = query.shape[2], keys.shape[2]
    for row in range(num_rows):
        own = query[:, :, row : row + 1]
        if tree is None:
            seen = num_keys - num_rows + row + 1
            yield own, keys[:, :, :seen], values[:, :, :seen]
        else:
            places = tree.keys(row, keys.device)
            yield own, keys.index_select(2, places), values.index_select(2, places)


def _mask(query: Tensor, key: Tensor, tree: TreeRows | None, *, added: bool) -> Tensor:
    """The mask of a block in one call, shape [1, 1, T, S]; to be added, or True for what is seen."""
    num_rows, num_keys = query.shape[2], key.shape[2]
    if tree is None:
        seen = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_rows)
    else:
        seen = ~tree.hidden(num_keys, query.device)
    if not added:
        return seen[None, None]
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)[None, None]


def _stock_attention(stock: str, module: nn.Module) -> Callable[..., AttentionOutput]:
    """The function the model's own module would have called; eager attention lives in its modeling file."""
    if stock == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[stock]  # type: ignore[no-any-return]
