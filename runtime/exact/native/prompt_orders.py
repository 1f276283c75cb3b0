"""`PromptOrders`: in which order torch's Linears add for each of many rows. Knows no layer.

For few rows there is one for all shapes; for more oneDNN chooses blocks along K by the numbers of rows, outputs and
threads. Which, is found when a prompt of so many tokens is first read, on numbers of which any other order shows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.exact.native.products import TILE, Order, pack_for_products, products
from runtime.exact.order import telling_linear

# Parts of equal length into which K was seen to be cut, and lengths of parts where it is cut otherwise.
PARTS = (1, 2, 3, 4, 8)
BLOCKS = range(256, 1025, TILE)
MOST_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Telling:
    """A Linear whose sums tell their order, and its weight as our kernel reads it."""

    linear: nn.Module
    packed: Tensor
    inputs: int
    outputs: int

    @classmethod
    def of(cls, like: nn.Linear) -> "Telling":
        """Of the class and shape of another; of that size, since the order depends on it."""
        outputs = like.weight.shape[0]
        linear, inputs = telling_linear(like, outputs, largest=None)
        weight: Tensor = linear.weight  # type: ignore[assignment]
        return cls(linear, pack_for_products(weight), inputs, outputs)

    def order(self, rows: int, tiles: bool, tried: Sequence[Order]) -> Order | None:
        """In which the Linear adds where it takes so many rows; None where it is none that is known.

        Args:
            tried: first.
        """
        bias: Tensor | None = self.linear.bias  # type: ignore[assignment]
        # Every row has the roundings of the first, in numbers of its own.
        scales = torch.exp2(torch.arange(rows) % 5 - 2.0).to(self.packed.device, torch.bfloat16)
        hidden = scales[:, None].expand(rows, self.inputs).contiguous()[None]
        expected = self.linear(hidden)
        if bias is None and not torch.equal(expected[0], expected[0, :1] * (scales / scales[0])[:, None]):
            return None  # rows add in several orders
        for order in dict.fromkeys([*tried, *_orders(self.inputs, tiles)]):
            how = bias, self.outputs, order
            if torch.equal(products(hidden[:, :1], self.packed, *how), expected[:, :1]):
                alike = bias is None or torch.equal(products(hidden, self.packed, *how), expected)
                return order if alike else None
        return None


def _orders(inputs: int, tiles: bool) -> Iterator[Order]:
    """Orders in which oneDNN was seen to add for many rows, those that it takes more often first."""
    parts = [-(-inputs // (part * TILE)) * TILE for part in PARTS]
    blocks = list(dict.fromkeys([*parts, *(block for block in BLOCKS if block < inputs)]))
    yield from (Order(tiles, block) for block in blocks)
    # Several threads share out the blocks along K, and what each has is added in the end.
    for threads in range(2, min(torch.get_num_threads(), MOST_GROUPS) + 1):
        groups = [(block, math.ceil(math.ceil(inputs / block) / threads) * block) for block in blocks]
        yield from (Order(tiles, block, group) for block, group in groups if group < inputs)


class PromptOrders:
    """The orders of the Linears of a layer, by the number of rows.

    Args:
        linears: one of each group that has its own: queries; keys and values; output; gate and up; down.
        tiles: whether our kernel adds by the CPU's tiles.
    """

    def __init__(self, linears: Sequence[nn.Linear], tiles: bool) -> None:
        self.linears, self.tiles = linears, tiles
        self._telling: dict[tuple[int, int, bool], Telling] = {}
        self._found: dict[tuple[int, int], tuple[Order, ...] | None] = {}
        self._seen: dict[int, dict[Order, None]] = {}

    def __call__(self, rows: int) -> tuple[Order, ...] | None:
        """An order for each of the Linears; None where one of them adds in no order that is known."""
        key = rows, torch.get_num_threads()
        if key not in self._found:
            self._found[key] = self._of(rows)
        return self._found[key]

    def _of(self, rows: int) -> tuple[Order, ...] | None:
        found: dict[tuple[int, int, bool], Order] = {}
        for linear in self.linears:
            shape = _shape(linear)
            if shape in found:
                continue
            if shape not in self._telling:
                self._telling[shape] = Telling.of(linear)
            seen = self._seen.setdefault(shape[1], {})
            order = self._telling[shape].order(rows, self.tiles, list(seen))
            if order is None:
                return None
            seen[order] = None
            found[shape] = order
        return tuple(found[_shape(each)] for each in self.linears)


def _shape(linear: nn.Linear) -> tuple[int, int, bool]:
    """Outputs and inputs as the weight has them, and whether there is a bias."""
    outputs, inputs = linear.weight.shape
    return outputs, inputs, linear.bias is not None
