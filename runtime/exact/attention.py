"""Attention for a block of new tokens, as plain decoding would have computed each of them.

Registered with transformers' attention interface around the implementation the model already uses. `rowwise`
calls that implementation once per query row, on exactly the keys that row may see: the same call that one-token
decoding makes, so the same bits. `grouped` gives several rows to one call of torch's kernel, as heads of one query
each, which on some CPUs keeps every bit too. `batched` makes one call with a causal mask: faster, not always the same
bits. Knows nothing of models, caches or drafting.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.errors import UnsupportedModel

SUPPORTED = ("eager", "sdpa")
# How a block attends; cheapest first.
KINDS = ("batched", "grouped", "rowwise")
# Keys that the CPU's kernels take in one vector. Hidden keys after a row's own add nothing, but where they fill up the
# vector in which the row's own keys end, these are added up in another order.
VECTOR = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
AttentionOutput = tuple[Tensor, Any]


@contextmanager
def block_attention(model: PreTrainedModel, kind: str) -> Iterator[None]:
    """While open, the model's attention modules take blocks of new tokens without a mask.

    Args:
        kind: one of `KINDS`; eager attention knows no groups and goes row by row there.

    Raises:
        UnsupportedModel: where the model uses an implementation other than eager or sdpa.
    """
    stock = model.config._attn_implementation
    if stock not in SUPPORTED:
        raise UnsupportedModel(
            f"attention implementation {stock!r} is not supported: load the model with attn_implementation='sdpa'"
        )
    if stock == "eager" and kind == "grouped":
        kind = "rowwise"
    name = f"specbound_{kind}_{stock}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        attend = {"rowwise": _rowwise, "grouped": _grouped, "batched": _batched}[kind]
        AttentionInterface.register(name, partial(attend, stock))
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = stock


def _rowwise(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    """Query [B, H, T, E] against key and value [B, KV, S, E], one row at a time; output [B, T, H, E]."""
    attend = _stock_attention(stock, module)
    num_rows, num_keys = query.shape[2], key.shape[2]
    if num_rows == 1:
        return attend(module, query, key, value, None, **kwargs)
    rows = []
    for row in range(num_rows):
        seen = num_keys - num_rows + row + 1
        rows.append(
            attend(module, query[:, :, row : row + 1], key[:, :, :seen], value[:, :, :seen], None, **kwargs)[0]
        )
    return torch.cat(rows, dim=1), None


def _grouped(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """As `_rowwise`, in a call for each group."""
    if query.shape[2] == 1:
        return _stock_attention(stock, module)(module, query, key, value, None, scaling=scaling, **kwargs)
    return attend_in_groups(query, key, value, scaling).transpose(1, 2), None


def attend_in_groups(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
    """Row t of T on the first S - T + t + 1 keys, rows whose keys end in the same vector in one call.

    Args:
        query: shape [1, H, T, E].
        keys, values: shape [1, G, S, E]; each of the G heads serves H / G heads of the query.

    Returns:
        Shape [1, H, T, E].
    """
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
        mask = None if rows == 1 else _hidden(seen, rows, num_heads // num_shared, query.dtype, query.device)
        output = functional.scaled_dot_product_attention(part, own_keys, own_values, attn_mask=mask, scale=scaling)
        attended.append(output.reshape(1, num_heads, rows, size))
        row += rows
    return attended[0] if len(attended) == 1 else torch.cat(attended, 2)


@lru_cache(maxsize=8)
def _hidden(first: int, rows: int, times: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Hides all but the first `first + r` keys from row r, shape [1, times * rows, 1, keys]; one for all layers."""
    seen = torch.ones(rows, first + rows - 1, dtype=torch.bool, device=device).tril(first - 1)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
    return mask.repeat(times, 1)[None, :, None]


def _batched(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    """As `_rowwise`, in one call: row t of T sees the first S - T + t + 1 keys, or what a mask to be added tells."""
    num_rows, num_keys = query.shape[2], key.shape[2]
    if mask is None and num_rows > 1:
        seen = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_rows)
        mask = seen[None, None]
        if stock == "eager":
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return _stock_attention(stock, module)(module, query, key, value, mask, **kwargs)


def _stock_attention(stock: str, module: nn.Module) -> Callable[..., AttentionOutput]:
    """The function the model's own module would have called; eager attention lives in its modeling file."""
    if stock == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[stock]  # type: ignore[no-any-return]
