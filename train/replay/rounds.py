"""The kinds of rounds that some exits can make, and what each costs. Knows no bounds and no texts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.replay.costs import CostTable

Ints = NDArray[np.int64]
Small = NDArray[np.int8]
Floats = NDArray[np.float64]
MAX_DRAFTS = 30  # of one round; replay keeps a row of all positions for each


class Kinds:
    """Kinds of rounds, numbered as they come up: 0 asks no exit, every other is an earlier one with a question more.

    The answer to a question is i + 1 where the i-th of E exits drafts, or E + 1 where none is sure: a hard token,
    which ends a round, so that further answers leave its kind as it is. Few kinds make up a text.

    Args:
        exits: sources that are asked, shallowest first.
        costs: of the parts of a round.

    Attributes:
        ms: what a round costs of which no draft is accepted, with an empty context, and what every token of context
            adds, shape [kinds or more, 2].
        counts: its drafts by exit, and its hard tokens, shape [kinds or more, E + 1].
    """

    def __init__(self, exits: tuple[int, ...], costs: CostTable) -> None:
        self.exits = exits
        asking = np.cumsum([0.0, *(costs.lookup if layer == 0 else costs.head for layer in exits)])
        self._asking = np.append(asking, asking[-1])  # ms by answer
        self._reached = np.array([0, *exits, max(exits, default=0)])  # depth by answer
        self._depths = np.array(sorted({0, *exits, costs.num_hidden_layers}))  # between two of them is a block
        widths = range(1, MAX_DRAFTS + 2)
        layer = [(costs.block(costs.layer, width), costs.block(costs.layer_context, width)) for width in widths]
        self._blocks: Floats = np.diff(self._depths)[:, None, None] * np.array([(0.0, 0.0), *layer])
        self._end = np.array([costs.round + costs.token + costs.block(costs.unembedding, width) for width in widths])
        self._num = 1
        self._next: Ints = np.zeros((1, len(exits) + 2), dtype=np.int64)  # by answer; 0 where it never came up
        # Before verification: tokens that lack each block, and ms as in `ms`.
        self._lacking: Ints = np.zeros((1, len(self._depths) - 1), dtype=np.int64)
        self._spent: Floats = np.zeros((1, 2))
        self.counts: Floats = np.zeros((1, len(exits) + 1))
        self.ms = self._verified(self._lacking, self._spent, self.counts)

    def after(self, kinds: Ints, answers: Small) -> Ints:
        """Each kind with one answer more, shape [n] as both."""
        keys = kinds * self._next.shape[1] + answers
        found = self._next.take(keys)
        if np.count_nonzero(found) < len(found):
            self._add(np.unique(keys[found == 0]))
            found = self._next.take(keys)
        return found

    def totals(self, kinds: Ints) -> list[int]:
        """Drafts by exit, and hard tokens, of many rounds; kinds of shape [n]."""
        each = self.counts.take(kinds, axis=0)
        return (np.ones(len(each)) @ each).astype(int).tolist()

    def _add(self, keys: Ints) -> None:
        """The kinds that `after` looks for there, each once."""
        parent, answer = np.divmod(keys, self._next.shape[1])
        number = np.arange(self._num, self._num + len(keys))
        lacking = self._lacking[parent] + 1
        runs = self._depths[1:] <= self._reached[answer][:, None]
        spent = self._spent[parent] + self._layers(lacking * runs)  # as `DecodeState.advance`: one block of all
        spent[:, 0] += self._asking[answer]
        lacking *= ~runs
        counts = self.counts[parent]
        counts[np.arange(len(keys)), answer - 1] += 1
        self._next.put(keys, number)
        self._next = _put(self._next, self._num, number[:, None] * (counts[:, -1:] > 0))
        self._lacking = _put(self._lacking, self._num, lacking)
        self._spent = _put(self._spent, self._num, spent)
        self.counts = _put(self.counts, self._num, counts)
        self.ms = _put(self.ms, self._num, self._verified(lacking, spent, counts))
        self._num += len(keys)

    def _verified(self, lacking: Ints, spent: Floats, counts: Floats) -> Floats:
        """Ms once every token is through; a hard token is the last of its round, a draft has one after it."""
        ms = spent + self._layers(lacking + (counts[:, -1:] == 0))
        ms[:, 0] += self._end[counts[:, :-1].sum(axis=1).astype(int)]
        return ms

    def _layers(self, widths: Ints) -> Floats:
        """Ms of running each block on so many tokens, shape [n, blocks] to [n, 2]."""
        each: Floats = self._blocks[np.arange(widths.shape[1]), widths]
        return each.sum(axis=1)


def _put(array: NDArray[Any], start: int, rows: NDArray[Any]) -> NDArray[Any]:
    """With those rows from `start` on, where there is room or after doubling: few copies for many rows."""
    while len(array) < start + len(rows):
        array = np.concatenate([array, np.zeros_like(array)])
    array[start : start + len(rows)] = rows
    return array
