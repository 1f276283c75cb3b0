"""`Prefixes`: how many rows two prompts that begin alike have in common to the bit. Knows no model and no memory.

A row of a prompt depends on the prompt's length: torch multiplies many rows in blocks along K that it chooses by their
number, and attends from blocks of queries, the last of which is cut short, to blocks of keys that it may add up by
their number. Where our own kernel attends (`PromptAttention`) it is known which rows add alike. Elsewhere rows in
whole blocks of queries are the same if torch attends alike to both prompts, which is looked at.
"""

from collections.abc import Callable, Sequence

import torch

from runtime.exact.native.products import Order
from runtime.exact.native.prompt_attention import PromptAttention, block_of

LIKE = 512  # tokens; prompts of like lengths, with as many blocks of keys, are proven together
MOST = 4096  # pairs of lengths that are remembered


class Prefixes:
    """Of one model's prompts.

    Args:
        attention: of the layers.
        orders: of products, by the number of rows; None where they are not known.

    Attributes:
        proven: by kinds of prompts, whether one that was read in two parts had every bit of the whole.
    """

    def __init__(self, attention: PromptAttention, orders: Callable[[int], Sequence[Order] | None]) -> None:
        self.attention, self.orders = attention, orders
        self.proven: dict[tuple[int, ...], bool] = {}
        self._found: dict[tuple[int, int, int], int] = {}

    def common(self, one: int, other: int, alike: int) -> int:
        """Rows that prompts of so many tokens have in common.

        Args:
            one, other: tokens of each.
            alike: with which both begin.
        """
        orders = self.orders(other)
        if orders is None or orders != self.orders(one) or not self.proven.get(self.kind(one, other), True):
            return 0
        if self.are_known(one, other):
            return min(alike, self.attention.common(one, other))
        block = block_of(one)
        rows = min(alike, one, other) // block * block if block_of(other) == block else 0
        if not rows:
            return 0
        key = one, other, torch.get_num_threads()
        if key not in self._found:
            if len(self._found) == MOST:
                self._found.clear()
            self._found[key] = self._same_rows(one, other)
        return min(rows, self._found[key] // block * block)

    def kind(self, one: int, other: int) -> tuple[int, ...]:
        """Of prompts of so many tokens: where lengths and threads are like this, what was proven for others holds."""
        threads = torch.get_num_threads()
        if self.are_known(one, other):
            return (threads,)
        return threads, block_of(one), one // LIKE, other // LIKE

    def are_known(self, one: int, other: int) -> bool:
        """Whether our own kernel attends in both."""
        return self.attention.knows(one) and self.attention.knows(other)

    def _same_rows(self, one: int, other: int) -> int:
        """Rows before the first that torch attends to otherwise, on values that cancel."""
        shorter = min(one, other)
        outputs = [self.attention.stock(*self.attention.told(length))[0, :shorter] for length in (one, other)]
        same = (outputs[0] == outputs[1]).all(-1).all(-1)
        return shorter if bool(same.all()) else int(same.int().argmin())
