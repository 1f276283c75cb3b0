"""`PromptAttention`: attention of a prompt by our own kernel, where it is known how torch adds for many queries.

That is MKL's order, on CPUs without AMX. In it a row depends on the rows before it alone, and on how many keys the
prompt has: rows behind a beginning that was read before do not attend to it anew. Knows no model.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runtime.exact.native.attend import can_attend
from runtime.exact.native.library import native_library
from runtime.exact.order import cancelling

# Queries that torch's kernel takes together, by the least number of them in all, and keys.
QUERIES, KEYS = ((768, 256), (192, 64), (0, 32)), 512
# Fewer queries or keys at the end than these MKL multiplies in other orders.
FEW_QUERIES, FEW_KEYS = 4, 12
PARTS = 192  # keys that are summed apart, or halves of fewer than two such parts
VECTOR = 16  # keys; what fills none is weighed apart
CHUNK = 16  # keys whose values cancel: a row behind them has their roundings alone

Attend = Callable[..., tuple[Tensor, Any]]


class PromptAttention:
    """Of the layers of one model.

    Args:
        heads: of queries, of keys, and the size of each.
        scaling: of scores.
        attend: transformers' function, which a prompt's forward calls.
        in_all: whether heads and scaling are those of all layers; otherwise torch attends.
    """

    def __init__(self, heads: tuple[int, int, int], scaling: float, attend: Attend, *, in_all: bool = True) -> None:
        self.heads, self.scaling, self.attend = heads, scaling, attend
        self.module = nn.Module()
        self.module.__dict__.update(num_key_value_groups=heads[0] // heads[1], is_causal=True)
        self._is_known = in_all  # until torch adds otherwise at the first length that is looked at
        self._lengths: dict[tuple[int, int], bool] = {}
        self._told: tuple[Tensor, Tensor, Tensor] | None = None

    def knows(self, length: int) -> bool:
        """Whether the kernel has torch's bits for a prompt of so many tokens: looked at once for each length."""
        key = length, torch.get_num_threads()
        if self._is_known and key not in self._lengths:
            few = length % block_of(length)
            # Of three queries torch adds the values otherwise when they stand alone.
            self._lengths[key] = length > FEW_KEYS and few != FEW_QUERIES - 1 and self._is_same(length)
        return self._is_known and self._lengths[key]

    def _is_same(self, length: int) -> bool:
        parts = self.told(length)
        found = self(*parts) if can_attend(*parts) else None
        same = found is not None and torch.equal(found, self.stock(*parts))
        self._is_known = same or any(self._lengths.values())
        return same

    def told(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of so many tokens that tell for each row how torch adds; of a few of the heads."""
        if self._told is None or self._told[0].shape[2] < length:
            queries, shared, size = self.heads
            few = min(shared, 1 if queries > shared else 2)
            self._told = telling((queries // shared * few, few, size), 2 * length)
        query, keys, values = (tensor[:, :, :length].contiguous() for tensor in self._told)
        return query, keys, values

    def stock(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """As the model's own forward has it, [1, H, R, E] to [1, R, H, E]; without a mask of the whole prompt."""
        return self.attend(self.module, query, keys, values, mask, dropout=0.0, scaling=self.scaling)[0]

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, whole: int | None = None) -> Tensor | None:
        """Rows of a prompt, each on the keys up to its own; None where some number is not finite.

        Args:
            query: shape [1, H, R, E], bfloat16, on the CPU: the last of the T that are there.
            keys, values: shape [1, G, T, E], T not below R.
            whole: tokens of the prompt; by default T. If they are more, the T leave its `few_rows` out.

        Returns:
            Shape [1, R, H, E].
        """
        library = native_library()
        assert library is not None
        (_, heads, rows, size), length = query.shape, keys.shape[2]
        whole = length if whole is None else whole
        output = query.new_empty(1, rows, heads, size)
        strides = [part.stride(dim) for part in (query, keys, values) for dim in (1, 2)]
        sizes = (ctypes.c_int64 * 12)(rows, heads, heads // keys.shape[1], size, length, *strides, whole)
        pointers = [part.data_ptr() for part in (query, keys, values, output)]
        if not library.specbound_reading(*pointers, sizes, self.scaling, torch.get_num_threads()):
            return None
        few = few_rows(whole) if length == whole else 0
        if few:  # torch multiplies the same queries and keys, in the same order, when they stand alone
            last = nn.functional.pad(query[:, :, -few:], (0, 0, max(0, few - rows), 0))
            mask = torch.ones(few, length, dtype=torch.bool).tril(length - few)[None, None] if few > 1 else None
            output[:, -few:] = self.stock(last, keys, values, mask)[:, -rows:]
        return output

    def common(self, one: int, other: int) -> int:
        """Rows that prompts of so many tokens, which begin alike, have in common to the bit; both lengths are known.

        A row is the same where its keys are summed in the same parts and weighed in the same vectors: that depends on
        how many keys its last block has in all.
        """
        shorter = min(one, other)
        blocks = shorter // KEYS
        counts = [min(KEYS, length - blocks * KEYS) for length in (one, other)]
        fewer = min(counts) // VECTOR * VECTOR
        parts = [_part(count) for count in counts]
        behind = fewer if parts[0] == parts[1] else min(fewer, *parts)
        return min(blocks * KEYS + behind, one - few_rows(one), other - few_rows(other))


def block_of(length: int) -> int:
    """Queries that torch's kernel takes together where there are so many in all."""
    return next(block for least, block in QUERIES if length >= least)


def few_rows(length: int) -> int:
    """Rows at the end of a prompt that torch multiplies in other orders, because they or their keys are few."""
    rows = length % block_of(length)
    return rows if rows < FEW_QUERIES or 0 < length % KEYS < FEW_KEYS else 0


def _part(count: int) -> int:
    """Of the keys of a block, as many as are summed apart."""
    return count if count <= PARTS else count // 2 if count < 2 * PARTS else PARTS


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
