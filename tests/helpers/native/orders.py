"""Orders of addition, written down in plain torch: what our own kernels are held against, and torch's."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from runtime.exact.native.attend import ORDERS
from runtime.exact.order import cancelling


def _in_pairs(terms: Tensor) -> Tensor:
    """Sum of terms [K, N] from zero: pairs in order, of each the second number first."""
    total = torch.zeros_like(terms[0])
    for first in range(0, len(terms), 2):
        for term in reversed(terms[first : first + 2]):
            total = total + term
    return total


def _by_tiles(terms: Tensor) -> Tensor:
    """Sum of terms [K, N]: 32 at a time, even and odd ones apart."""
    total = torch.zeros_like(terms[0])
    for tile in torch.split(terms, 32):
        apart = torch.zeros(2, *total.shape)
        for place, term in enumerate(tile):
            apart[place % 2] += term
        total = total + (apart[0] + apart[1])
    return total


def value_sum(terms: Tensor, order: str) -> Tensor:
    """What one of `attend.ORDERS` makes of the terms [S, N], float32, of up to 512 keys."""
    if order == "pairs":
        return _in_pairs(terms)
    if order == "tiles":
        return _by_tiles(terms)
    if order == "ones":
        return _in_blocks(terms)
    total = torch.zeros_like(terms[0])
    if order == "eights":
        for eight in torch.split(terms, 8):
            total = total + _in_pairs(eight)
        return total
    whole = len(terms) // 4 * 4
    for one, two, three, four in terms[:whole].view(-1, 4, terms.shape[1]):
        total = total + ((one + three) + (two + four))
    for term in reversed(terms[whole:]):
        total = total + term
    return total


def score_sum(terms: Tensor, order: str) -> Tensor:
    """What one of `attend.ORDERS` makes of the terms [E, N], float32, along a head."""
    if order == "pairs":
        return _in_pairs(terms)
    if order == "tiles":
        return _by_tiles(terms)
    if order == "ones":
        return _in_blocks(terms)
    if order == "fours":
        zero, one, two, three = (_one_by_one(terms[first::4]) for first in range(4))
        return (zero + two) + (one + three)
    pairs = torch.split(terms, 2)
    parts = [_in_pairs(torch.cat(pairs[first::16])) for first in range(min(16, len(pairs)))]
    parts += [torch.zeros_like(terms[0])] * (16 - len(parts))
    level = [parts[place] + parts[place + 8] for place in range(8)]
    while len(level) > 1:
        level = [one + other for one, other in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _one_by_one(terms: Tensor) -> Tensor:
    """Sum of terms [K, N] in order."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _in_blocks(terms: Tensor) -> Tensor:
    """Sum of terms [K, N]: in order, blocks of 192 apart, or half of fewer than two of these."""
    block = len(terms) if len(terms) <= 192 else len(terms) // 2 if len(terms) < 384 else 192
    return _one_by_one(torch.stack([_one_by_one(part) for part in torch.split(terms, block)]))


def telling_values(keys: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A query of zeros, which weighs all keys alike, any keys, and values that cancel: [1, 1, 1 or S, E], bfloat16."""
    values = cancelling(size, keys, torch.bfloat16).t().contiguous()
    return torch.zeros(1, 1, 1, size).bfloat16(), torch.zeros(1, 1, keys, size).bfloat16(), values[None, None]


def orders_of(attended: Tensor, values: Tensor) -> list[str]:
    """Orders that an output [E] shows, of values [1, 1, S, E] that were weighed alike.

    A weight is rounded to 1 in the values' sum, and not quite 1 in the weights' own: a step of bfloat16 is let pass.
    """
    keys = values[0, 0].float()
    means = {order: value_sum(keys, order) / len(keys) for order in ORDERS}
    return [order for order, mean in means.items() if torch.allclose(attended.float(), mean, rtol=0.01, atol=1e-30)]


@cache
def torch_order() -> str | None:
    """The order in which torch attends for one row here, as its outputs tell; None where it is none of these."""
    query, keys, values = telling_values(203, 64)
    found = orders_of(functional.scaled_dot_product_attention(query, keys, values)[0, 0, 0], values)
    return found[0] if len(found) == 1 else None
