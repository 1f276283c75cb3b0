"""`RowAttention`: an attention module that takes a block's rows one by one, each over the keys that it sees.

For modules that attend past transformers' attention interface, or make their keys of what is cached: the whole module
runs as in one-token decoding, its own Linears with it. Knows no policy, no family and no draft.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from runtime.decoding.cache import KVCache
from runtime.decoding.rows import TreeRows, as_alone


class RowAttention:
    """In the place of a module's `forward`, on a block [1, T, D] of one request.

    Args:
        forward: the module's own.
        layer: its index.
        cache_argument: what it calls its cache.
        stock: `eager` or `sdpa`; with `eager` masks are added.
        masked: one row alone gets a mask that hides nothing.
        whole: the block goes through the module at once, behind a mask: not always the same bits.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        layer: int,
        *,
        cache_argument: str,
        stock: str,
        masked: bool,
        whole: bool,
    ) -> None:
        self.forward, self.layer, self.cache_argument = forward, layer, cache_argument
        self.adds, self.masked, self.whole = stock == "eager", masked or stock == "eager", whole

    def __call__(self, *args: Any, **given: Any) -> Any:
        """As the module: attended states [1, T, D], and what it returns beside them of its last row."""
        states: Tensor = args[0] if args else given.pop("hidden_states")
        rows, rest = states.shape[1], args[1:]
        cache: KVCache = given.pop(self.cache_argument)
        tree: TreeRows | None = given.pop("attention_mask")
        if self.whole:
            given |= {"attention_mask": self._hidden(states, cache, tree), self.cache_argument: cache}
            return self.forward(states, *rest, **given)
        parts, others = [], []
        for row, seen in self._seen(rows, cache, tree):
            own = {name: _row(value, row, rows) for name, value in given.items()}
            own |= {"attention_mask": self._nothing_hidden(states, seen.length(self.layer)), self.cache_argument: seen}
            part, *others = self.forward(_row(states, row, rows), *rest, **own)
            parts.append(part)
        return (parts[0] if rows == 1 else torch.cat(parts, 1), *others)

    def _seen(self, rows: int, cache: KVCache, tree: TreeRows | None) -> Iterator[tuple[int, "SeenKeys"]]:
        """Each row, and the cache as that row alone finds it."""
        for row in range(rows):
            yield row, SeenKeys(cache, None if tree is None else (tree, row))

    def _nothing_hidden(self, like: Tensor, length: int) -> Tensor | None:
        """The mask that plain decoding has for one row and so many keys; None where it has none."""
        if not self.masked:
            return None
        shape = (1, 1, 1, length)
        if self.adds:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        return torch.ones(shape, dtype=torch.bool, device=like.device)

    def _hidden(self, like: Tensor, cache: KVCache, tree: TreeRows | None) -> Tensor:
        """The mask of a whole block, [1, 1, T, S]."""
        rows = like.shape[1]
        length = cache.get_seq_length(self.layer) + rows
        if tree is None:
            seen = torch.ones(rows, length, dtype=torch.bool, device=like.device).tril(length - rows)
        else:
            seen = ~tree.hidden(length, like.device)
        if not self.adds:
            return seen[None, None]
        return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]


class SeenKeys:
    """A `KVCache` as one row of a block finds it: it writes there, and reads what is on its path."""

    def __init__(self, cache: KVCache, path: tuple[TreeRows, int] | None) -> None:
        self.cache, self.path = cache, path

    def length(self, layer_idx: int) -> int:
        """Keys that the row sees, itself among them."""
        if self.path is None:
            return self.cache.get_seq_length(layer_idx) + 1
        tree, row = self.path
        return tree.settled + len(tree.paths[row])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys before the row."""
        return self.length(layer_idx) - 1

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `KVCache.update`, of one row; all that it sees."""
        all_keys, all_values = self.cache.update(keys, values, layer_idx)
        if self.path is None:
            return all_keys, all_values
        tree, row = self.path
        places = tree.keys(row, keys.device)
        return all_keys.index_select(2, places), all_values.index_select(2, places)


def _row(value: Any, row: int, rows: int) -> Any:
    """Of what a layer passes on, the part that belongs to one row: tensors [1, T, ...], alone or in a tuple."""
    if isinstance(value, tuple):
        return tuple(_row(each, row, rows) for each in value)
    if not isinstance(value, Tensor) or rows == 1 or value.dim() < 2 or value.shape[1] != rows:
        return value
    return as_alone(value[:, row : row + 1])
