"""Attention for a block of new tokens, as plain decoding would have computed each of them.

Registered with transformers' attention interface around the implementation the model already uses. `rowwise`
calls that implementation once per query row, on exactly the keys that row may see: the same call that one-token
decoding makes, so the same bits. `batched` makes one call with a causal mask: faster, not always the same bits.
Knows nothing of models, caches or drafting.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.errors import UnsupportedModel

SUPPORTED = ("eager", "sdpa")
AttentionOutput = tuple[Tensor, Any]


@contextmanager
def block_attention(model: PreTrainedModel, *, rowwise: bool) -> Iterator[None]:
    """While open, the model's attention modules take blocks of new tokens without a mask.

    Raises:
        UnsupportedModel: where the model uses an implementation other than eager or sdpa.
    """
    stock = model.config._attn_implementation
    if stock not in SUPPORTED:
        raise UnsupportedModel(
            f"attention implementation {stock!r} is not supported: load the model with attn_implementation='sdpa'"
        )
    name = f"specbound_{'rowwise' if rowwise else 'batched'}_{stock}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_rowwise if rowwise else _batched, stock))
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


def _batched(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    """As `_rowwise`, in one call: row t of T sees the first S - T + t + 1 keys."""
    num_rows, num_keys = query.shape[2], key.shape[2]
    if num_rows > 1:
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
