"""`Prefixes`: how many rows two prompts that begin alike have in common to the bit. Knows no model and no memory.

A row of a prompt depends on the prompt's length: torch multiplies many rows in blocks along K that it chooses by their
number, and attends from blocks of queries, the last of which is cut short, to blocks of keys that it may add up by
their number. So rows in whole blocks of queries are the same in prompts whose products add alike, if torch attends
alike to both, which is looked at.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runtime.exact.native.products import Order
from runtime.exact.order import cancelling

# Queries that torch's kernel takes together, by the least number of them in all.
QUERIES = ((768, 256), (192, 64), (0, 32))
LIKE = 512  # tokens; prompts of like lengths, with as many blocks of keys, are proven together
CHUNK = 16  # keys whose values cancel: a row behind them has their roundings alone
MOST = 4096  # pairs of lengths that are remembered

Attend = Callable[..., tuple[Tensor, Any]]


class Prefixes:
    """Of one model's prompts.

    Args:
        heads: of queries, of keys, and the size of each.
        scaling: of scores.
        attend: transformers' function, which a prompt's forward calls.
        orders: of products, by the number of rows; None where they are not known.

    Attributes:
        proven: by kinds of prompts, whether one that was read in two parts had every bit of the whole.
    """

    def __init__(
        self,
        heads: tuple[int, int, int],
        scaling: float,
        attend: Attend,
        orders: Callable[[int], Sequence[Order] | None],
    ) -> None:
        self.heads, self.scaling, self.attend, self.orders = heads, scaling, attend, orders
        self.module = nn.Module()
        self.module.__dict__.update(num_key_value_groups=heads[0] // heads[1], is_causal=True)
        self.proven: dict[tuple[int, ...], bool] = {}
        self._found: dict[tuple[int, int, int], int] = {}
        self._told: tuple[Tensor, Tensor, Tensor] | None = None

    def common(self, one: int, other: int, alike: int) -> int:
        """Rows that prompts of so many tokens have in common.

        Args:
            one, other: tokens of each.
            alike: with which both begin.
        """
        block = block_of(one)
        rows = min(alike, one, other) // block * block if block_of(other) == block else 0
        orders = self.orders(other) if rows else None
        if orders is None or orders != self.orders(one) or not self.proven.get(self.kind(one, other), True):
            return 0
        key = one, other, torch.get_num_threads()
        if key not in self._found:
            if len(self._found) == MOST:
                self._found.clear()
            self._found[key] = self._same_rows(one, other)
        return min(rows, self._found[key] // block * block)

    def kind(self, one: int, other: int) -> tuple[int, ...]:
        """Of prompts of so many tokens: where lengths and threads are like this, what was proven for others holds."""
        return torch.get_num_threads(), block_of(one), one // LIKE, other // LIKE

    def _same_rows(self, one: int, other: int) -> int:
        """Rows before the first that attends otherwise, on values that cancel."""
        longer, shorter = max(one, other), min(one, other)
        if self._told is None or self._told[0].shape[2] < longer:
            self._told = telling(self.heads, 2 * longer)
        outputs = []
        for length in (one, other):
            parts = [tensor[:, :, :length].contiguous() for tensor in self._told]
            outputs.append(self.attend(self.module, *parts, None, dropout=0.0, scaling=self.scaling)[0])
        same = (outputs[0][0, :shorter] == outputs[1][0, :shorter]).all(-1).all(-1)
        return shorter if bool(same.all()) else int(same.int().argmin())


def block_of(length: int) -> int:
    """Queries that torch's kernel takes together where there are so many in all."""
    return next(block for least, block in QUERIES if length >= least)


def telling(heads: tuple[int, int, int], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, heads, N, E] that tell for each row how torch adds; N is `length` or little more.

    Every other head weighs all keys alike, so that its output is a sum of values that cancel: within chunks, so that
    rows everywhere have roundings of their own. The others have keys that cancel: all of a score is rounding.

    Returns:
        bfloat16.
    """
    queries, shared, size = heads
    chunks = -(-length // CHUNK)
    length = chunks * CHUNK
    generator = torch.Generator().manual_seed(0)
    query = torch.exp2(torch.arange(length) % 5 - 2.0)[None, None, :, None].repeat(1, queries, 1, size)
    query[:, ::2] = 0
    keys = cancelling(shared * length, size, torch.bfloat16).view(1, shared, length, size)
    half = torch.randn(shared * size, chunks, CHUNK // 2, generator=generator)
    half *= torch.exp2(torch.randint(-24, 25, half.shape, generator=generator).float())
    places = torch.rand(chunks, CHUNK, generator=generator).argsort(-1).expand(len(half), -1, -1)
    values = torch.cat([half, -half], -1).gather(-1, places).view(1, shared, size, length).transpose(2, 3)
    return query.bfloat16(), keys, values.bfloat16()
