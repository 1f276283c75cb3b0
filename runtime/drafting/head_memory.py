"""`HeadMemory`: keys and values of an attention head for one request: of its settled text, and of what is pending.

Knows no base, no policy and no tree: what a row sees it is told.

Shape suffixes: T rows, S settled rows, M pending rows before these, D hidden size, G key heads, E head size.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.drafting.exit_head import NONE, OWN, VERIFIED, SettledStates
from runtime.drafting.unembedding import DraftUnembedding

# Settled positions that a head attends to, at least; twice as many are kept. Heads are fitted on such lengths.
WINDOW = 512


class HeadMemory:
    """Of one exit's head.

    Args:
        head: an `AttentionHead`, on the base's device and in its dtype.
    """

    def __init__(self, head: Any, unembedding: DraftUnembedding) -> None:
        self.head, self.unembedding = head, unembedding
        self.length = 0  # settled positions so far, those that were dropped included
        self._settled: tuple[Tensor, Tensor] | None = None  # keys and values [G, S, E]
        self._pending: tuple[Tensor, Tensor] | None = None  # keys and values [G, M, E]
        self._places: dict[int, int] = {}  # pending node -> its row among the M
        self._states: list[Tensor] = []  # of each of them, [D]

    def forget(self) -> None:
        """Nothing is pending any more."""
        self._pending, self._places, self._states = None, {}, []

    def settle(self, parts: Iterable[SettledStates]) -> None:
        """Take further settled positions, where there are any."""
        parts = tuple(parts)
        if not parts:
            return
        hidden, embedding, deep = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("hidden", "embedding", "deep")
        )
        number, device = len(embedding), embedding.device
        source = torch.full((number,), VERIFIED, device=device)
        if not parts[0].known:
            source[0] = NONE
        positions = torch.arange(self.length, self.length + number, device=device)
        _, _, keys, values = self.head.read(hidden, embedding, deep, source, positions)
        before = self._settled
        if before is not None:
            keys, values = torch.cat([before[0], keys], -2), torch.cat([before[1], values], -2)
        if keys.shape[-2] > 2 * WINDOW:
            keys, values = keys[:, -WINDOW:].clone(), values[:, -WINDOW:].clone()
        self._settled = keys, values
        self.length += number

    def logits(self, nodes: Sequence[int]) -> Tensor:
        """Draft logits [N, V] of pending tokens that were read."""
        return self.unembedding.of_normed(torch.stack([self._states[self._places[node]] for node in nodes]))

    def unread(self, number: int) -> list[int]:
        """Which of so many pending tokens were not read yet."""
        return [node for node in range(number) if node not in self._places]

    def read(
        self,
        nodes: Sequence[int],
        paths: Sequence[tuple[int, ...]],
        states: tuple[Tensor, Tensor],
        deep: Tensor | None,
    ) -> None:
        """Read pending tokens of one level that were not read before; those before them were.

        Args:
            nodes: places among the pending tokens.
            paths: of each pending token of the request, the places from the root to it.
            states: of the nodes, at the exit and at depth 0, each of shape [T, D].
            deep: the base's top state, normed, at the last settled position, shape [D]; None where it is not known.
        """
        hidden, embedding = states
        device, dtype = hidden.device, self.head.mix.weight.dtype
        number, known = len(nodes), len(self._states)
        before, source = torch.zeros(number, hidden.shape[1], dtype=dtype, device=device), [NONE] * number
        empty = torch.zeros(self.head.num_key_heads, 0, self.head.head_size, dtype=dtype, device=device)
        settled = self._settled or (empty, empty)
        pending = self._pending or (empty, empty)
        length = settled[0].shape[-2]
        seen = torch.zeros(number, length + known + number, dtype=torch.bool)
        seen[:, :length] = True
        for row, node in enumerate(nodes):
            path = paths[node]
            if len(path) == 1 and deep is not None:
                before[row], source[row] = deep, VERIFIED
            elif len(path) > 1 and path[-2] in self._places:
                before[row], source[row] = self._states[self._places[path[-2]]], OWN
            for place in path[:-1]:
                if place in self._places:
                    seen[row, length + self._places[place]] = True
            seen[row, length + known + row] = True
        positions = torch.tensor([self.length + len(paths[node]) - 1 for node in nodes], device=device)
        state, keys, values = self.head.step(
            hidden,
            embedding,
            before,
            torch.tensor(source, device=device),
            positions,
            torch.cat([settled[0], pending[0]], -2),
            torch.cat([settled[1], pending[1]], -2),
            seen.to(device),
            self.unembedding,
        )
        self._pending = torch.cat([pending[0], keys], -2), torch.cat([pending[1], values], -2)
        self._places |= {node: known + row for row, node in enumerate(nodes)}
        self._states += list(state)
