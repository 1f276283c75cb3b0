"""`Prefixes`: how many rows two prompts that begin alike have in common to the bit. Knows no model and no memory.

A row of a prompt depends on the prompt's length: torch multiplies many rows in blocks along K that it chooses by their
number, and attends over blocks of keys of which the last is cut short. So rows that see whole blocks alone are the
same in prompts whose products add alike, if torch attends alike to both, which is looked at.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runtime.exact.native.products import Order
from runtime.exact.order import telling_values

BLOCK = 512  # keys that torch's kernel takes together
LIKE = 256  # tokens; the longest of its blocks of queries
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

    def common(self, one: int, other: int, alike: int) -> int:
        """Rows that prompts of so many tokens have in common.

        Args:
            one, other: tokens of each.
            alike: with which both begin.
        """
        rows = min(alike, one, other) // BLOCK * BLOCK
        orders = self.orders(other) if rows else None
        if orders is None or orders != self.orders(one) or not self.proven.get(self.kind(one, other), True):
            return 0
        key = one, other, torch.get_num_threads()
        if key not in self._found:
            if len(self._found) == MOST:
                self._found.clear()
            self._found[key] = self._same_rows(one, other)
        return rows if rows <= self._found[key] else 0

    def kind(self, one: int, other: int) -> tuple[int, ...]:
        """Of prompts of so many tokens: where lengths and threads are like this, what was proven for others holds."""
        return torch.get_num_threads(), one // LIKE, other // LIKE

    def _same_rows(self, one: int, other: int) -> int:
        """Rows before the first that attends otherwise, on values that cancel."""
        query, keys, values = telling_values(self.heads, max(one, other), max(one, other), torch.bfloat16)
        given = [tensor.to(torch.bfloat16) for tensor in (query, keys, values)]
        outputs = []
        for length in (one, other):
            parts = [tensor[:, :, :length].contiguous() for tensor in given]
            outputs.append(self.attend(self.module, *parts, None, dropout=0.0, scaling=self.scaling)[0])
        shorter = min(one, other)
        same = (outputs[0][0, :shorter] == outputs[1][0, :shorter]).all(-1).all(-1)
        return shorter if bool(same.all()) else int(same.int().argmin())
