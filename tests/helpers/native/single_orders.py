"""The order in which MKL's loops for older CPUs add in float32 attention for one row, in plain numpy."""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from runtime.exact.order import cancelling


def telling_values(keys: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Five heads' queries of zeros, which weigh all keys alike; any keys; and values that cancel: [1, 5, S, E]."""
    values = cancelling(5 * size, keys, torch.float32).view(5, size, keys).transpose(1, 2).contiguous()
    return torch.zeros(1, 5, 1, size), torch.zeros(1, 5, keys, size), values[None]


def means(values: Tensor, threads: int) -> np.ndarray:
    """Of values [1, H, S, E] that weigh alike, as written down: [H, E]."""
    numbers = values[0].numpy()
    heads, keys, _ = numbers.shape
    sums = np.zeros_like(numbers[:, 0])
    fours = np.zeros_like(sums)  # of each eight keys of a block the last four apart
    for block in np.split(numbers, range(512, keys, 512), axis=1):
        whole = block.shape[1] // 8 * 8
        for key in range(block.shape[1]):
            sums += block[:, key]
        for eight in range(0, whole, 8):
            for key in range(eight, eight + 4):
                fours += block[:, key]
            fours += ((block[:, eight + 4] + block[:, eight + 5]) + block[:, eight + 6]) + block[:, eight + 7]
        for key in range(whole, block.shape[1]):
            fours += block[:, key]
    for head in range(heads):
        thread = head // -(-heads // min(threads, heads))
        first = -(thread + 1) * (min(512, keys) + 2) % 4
        sums[head, :first] = fours[head, :first]
    return sums * (np.float32(1) / np.float32(keys))


def score(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Of a query [E] and keys [S, E] of the last block, as written down: [S]."""
    terms = query * keys
    fours, left = len(keys) // 4 * 4, np.arange(len(keys)) % 4

    def summed(terms: np.ndarray, lanes: int, stop: int) -> np.ndarray:
        sums = np.zeros((len(terms), lanes), np.float32)
        for place in range(4):
            sums[:, 0] += terms[:, place]
        for place in range(4, stop):
            sums[:, place % lanes if lanes == 4 else (place - 4) % 8] += terms[:, place]
        if lanes == 8:
            sums = sums[:, :4] + sums[:, 4:]
        total = (sums[:, 0] + sums[:, 2]) + (sums[:, 1] + sums[:, 3])
        for place in range(stop, terms.shape[1]):
            total = total + terms[:, place]
        return total

    size = len(query)
    found = summed(terms, 4, size)
    for lanes, which in ((8, left != 1), (4, left == 1)):
        which = which & (np.arange(len(keys)) >= fours)
        found[which] = summed(terms, lanes, size - 4)[which]
    return found


def alone(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Torch's kernel for one row, [1, H, E]."""
    own = (part.repeat_interleave(query.shape[1] // keys.shape[1], 1) for part in (keys, values))
    return functional.scaled_dot_product_attention(query, *own)[:, :, 0]


@cache
def is_torch_s() -> bool:
    """Whether torch's own sums are those that are written down below, on this machine."""
    query, keys, values = telling_values(203, 64)
    stock = functional.scaled_dot_product_attention(query, keys, values)
    return np.array_equal(stock[0, :, 0].numpy(), means(values, torch.get_num_threads()))
