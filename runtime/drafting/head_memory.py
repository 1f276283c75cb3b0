"""`HeadMemory`: keys and values of an attention head for one request: of its settled text, and of what is pending.

Knows no base, no policy and no tree: what a row sees it is told.

Shape suffixes: T rows, M pending rows before these, D hidden size.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.drafting.exit_head import NONE, OWN, VERIFIED, SettledStates
from runtime.drafting.unembedding import DraftUnembedding

# Settled positions that a head attends to, at least; twice as many are kept. Heads are fitted on such lengths.
WINDOW = 512


class Reading(NamedTuple):
    """Rows of one request that a head reads: settled positions, then pending tokens of one level.

    Attributes:
        states: at the exit, at depth 0, and the top state before, each of shape [T, D].
        source: which kind of top state each has.
        positions: of each in the text.
        keys, values: shape [heads, capacity, head size]; rows are put behind the first `held`.
        settled: keys that all rows see.
        paths: of the pending tokens, the last rows, the places of further keys that they see, their own last.
    """

    states: tuple[Tensor, Tensor, Tensor]
    source: list[int]
    positions: list[int]
    keys: Tensor
    values: Tensor
    held: int
    settled: int
    paths: list[list[int]]


class HeadMemory:
    """Of one exit's head.

    Args:
        head: an `AttentionHead`, on the base's device and in its dtype.
        native: the same in our own kernel, where that takes it.

    Attributes:
        length: settled positions so far, those that were dropped included.
    """

    def __init__(self, head: Any, unembedding: DraftUnembedding, native: Any = None) -> None:
        self.head, self.unembedding, self.native = head, unembedding, native
        self.length = 0
        weight: Tensor = head.mix.weight
        empty = torch.empty(head.num_key_heads, 0, head.head_size, dtype=weight.dtype, device=weight.device)
        self._keys, self._values = empty, empty  # of settled rows, then of pending ones; with room for more
        self._settled = 0  # settled rows among them
        self._fresh: list[SettledStates] = []  # settled positions that are not among them yet
        self._places: dict[int, int] = {}  # pending node -> its row among the M
        self._states: list[Tensor] = []  # of each of them, [D]

    def forget(self) -> None:
        """Nothing is pending any more."""
        self._places, self._states = {}, []

    def settle(self, parts: Iterable[SettledStates]) -> None:
        """Take further settled positions, where there are any; they are read with the next pending tokens."""
        self._fresh += parts
        assert not (self._fresh and self._places)

    def unread(self, number: int) -> list[int]:
        """Which of so many pending tokens were not read yet."""
        return [node for node in range(number) if node not in self._places]

    def states(self, nodes: Sequence[int]) -> Tensor:
        """States [N, D] of pending tokens that were read, normed as the base's top states are."""
        return torch.stack([self._states[self._places[node]] for node in nodes])

    def reading(
        self,
        nodes: Sequence[int],
        paths: Sequence[tuple[int, ...]],
        states: tuple[Tensor, Tensor],
        deep: Tensor | None,
    ) -> Reading:
        """What there is to read for pending tokens of one level that were not read before; those before them were.

        What the head makes of it is to be given to `take`.

        Args:
            nodes: places among the pending tokens.
            paths: of each pending token of the request, the places from the root to it.
            states: of the nodes, at the exit and at depth 0, each of shape [T, D].
            deep: the base's top state, normed, at the last settled position, shape [D]; None where it is not known.
        """
        fresh, self._fresh = self._fresh, []
        new = sum(len(part.embedding) for part in fresh)
        source = [VERIFIED] * new
        if fresh and not fresh[0].known:
            source[0] = NONE
        positions = list(range(self.length, self.length + new))
        self.length += new
        before = []
        for node in nodes:
            path = paths[node]
            if len(path) > 1:
                before.append(self._states[self._places[path[-2]]])
                source.append(OWN)
            else:
                before.append(torch.zeros_like(states[0][0]) if deep is None else deep)
                source.append(NONE if deep is None else VERIFIED)
            positions.append(self.length + len(path) - 1)
        rows = (
            torch.cat([*(part.hidden for part in fresh), states[0]]),
            torch.cat([*(part.embedding for part in fresh), states[1]]),
            torch.cat([*(part.deep for part in fresh), torch.stack(before)]),
        )
        self._make_room(new, len(nodes))
        known, self._settled = len(self._states), self._settled + new
        own_paths = [
            [*(self._places[place] for place in paths[node][:-1]), known + row] for row, node in enumerate(nodes)
        ]
        held = self._settled - new + known
        return Reading(rows, source, positions, self._keys, self._values, held, self._settled, own_paths)

    def take(self, nodes: Sequence[int], made: Tensor) -> None:
        """Keep the states [T, D] of pending tokens that were read."""
        known = len(self._states)
        self._places |= {node: known + row for row, node in enumerate(nodes)}
        self._states += list(made)

    def _make_room(self, new: int, pending: int) -> None:
        """For further rows; of the settled ones the last are kept where they would be too many."""
        if new and self._settled + new > 2 * WINDOW:
            kept = max(0, WINDOW - new)
            for buffer in (self._keys, self._values):
                buffer[:, :kept] = buffer[:, self._settled - kept : self._settled].clone()
            self._settled = kept
        held = self._settled + len(self._states)
        if held + new + pending > self._keys.shape[1]:
            more = held + new + pending + WINDOW // 2
            self._keys, self._values = (
                torch.cat([buffer[:, :held], buffer.new_empty(len(buffer), more, buffer.shape[2])], dim=1)
                for buffer in (self._keys, self._values)
            )


def read_all(memories: Sequence[HeadMemory], readings: Sequence[Reading]) -> list[Tensor]:
    """What one exit's head makes of readings of several requests: states [T, D] of the pending tokens of each."""
    one = memories[0]
    if one.native is None:
        return [one.head.step(*reading, one.unembedding) for reading in readings]
    made: list[Tensor] = one.native.step(readings)
    return made
