"""`LookupTraces`: what the lookup (the depth-0 exit) would have proposed on logged text, and its confidence table.

A round's tree grows on text that the lookup has not read yet, so what it proposes depends on how far the root is; each
distance is logged. Needs no model: token ids and the base's choices are enough.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.drafting.heads import AGES
from runtime.drafting.lookup import MAX_MATCH, NUM_SUPPORTS, ContextLookup, LookupTable
from train.calibration.reliability import expected_calibration_error

# Weight of a cell's prior, in positions: the share of a few proposals alone is unreliable.
PRIOR_WEIGHT = 8.0
# Drafts logged after a wrong one: about the length of the longest round in a replay.
FOLLOWED = 15
NOTHING = ((0,) * FOLLOWED,) * 2
DISTANCES = len(AGES)  # of a draft's parent from the root; the last stands for all further ones


@dataclass(frozen=True, slots=True)
class LookupTraces:
    """Proposals at N response positions, for each distance from the root of a round's tree.

    Attributes:
        match: length of the match, shape [DISTANCES, N]; 0 where nothing was proposed.
        support: see `runtime.drafting.lookup`, shape [DISTANCES, N].
        correct: whether the proposal is the base's choice, shape [DISTANCES, N].
        token: the proposal, shape [DISTANCES, N]; -1 where nothing was proposed.
        after_wrong: match and support of the lookup's next proposals after a wrong one of its own at the root, shape
            [2, FOLLOWED, N]; match is 0 after a correct proposal and where the lookup would propose nothing.
    """

    match: NDArray[np.int64]
    support: NDArray[np.int64]
    correct: NDArray[np.bool_]
    token: NDArray[np.int64]
    after_wrong: NDArray[np.int64]

    @classmethod
    def collect(cls, rows: Iterable[tuple[Sequence[int], Sequence[int]]], targets: Iterable[int]) -> "LookupTraces":
        """Run the lookup over texts as the runtime would, one token at a time.

        Args:
            rows: prompt ids and response ids of each text.
            targets: the base's choice at each response position, text after text.
        """
        proposals, behind = [], []
        choices = iter(targets)
        for prompt, response in rows:
            lookup, text = ContextLookup(prompt[:-1]), [prompt[-1], *response[:-1]]
            wanted = [next(choices) for _ in text]
            logged: list[list[_Logged]] = [[] for _ in text]
            for root, newest in enumerate(text):
                for distance, choice in enumerate(wanted[root : root + DISTANCES]):
                    logged[root + distance].insert(0, _proposed(lookup, text[root : root + distance + 1], choice))
                nearest = logged[root][0]  # at the first positions no root is further off: nothing is asked there
                logged[root] += [logged[root][-1]] * (DISTANCES - len(logged[root]))
                lost = nearest.token >= 0 and not nearest.correct
                behind.append(_followed(lookup, newest) if lost else NOTHING)
                lookup.extend([newest])
            proposals += logged
        match, support, correct, token = np.moveaxis(np.array(proposals), -1, 0).swapaxes(1, 2)
        return cls(match, support, correct.astype(bool), token, np.moveaxis(np.array(behind), 0, -1))

    def fit(self) -> LookupTable:
        """Fit the table on roots: share of correct proposals by match and support, shrunk to that of the length."""
        match, support, correct = self.match[0], self.support[0], self.correct[0]
        proposed = match > 0
        overall = float(correct[proposed].mean()) if proposed.any() else 0.0
        rows = []
        for length in range(1, MAX_MATCH + 1):
            of_length = match == length
            prior = _share(correct[of_length], overall)
            cells = [_share(correct[of_length & (support == kind)], prior) for kind in range(NUM_SUPPORTS)]
            # as a file of traces holds them, so that the runtime and every replay compare the same with a threshold
            rows.append(tuple(float(np.float16(cell)) for cell in cells))
        return LookupTable(tuple(rows))

    def report(self, table: LookupTable) -> dict[str, float]:
        """Figures for `calibration.json`: shares of roots with a (correct) proposal, precision and ECE."""
        proposed, correct = self.match[0] > 0, self.correct[0]
        return {
            "proposed": float(proposed.mean()),
            "agreement": float(correct.mean()),
            "precision": float(correct[proposed].mean()) if proposed.any() else 0.0,
            "ece": expected_calibration_error(self.confidences(table)[0], correct),
        }

    def confidences(self, table: LookupTable) -> NDArray[np.float32]:
        """Calibrated confidence at each position, shape [DISTANCES, N]; 0 where nothing was proposed."""
        return _looked_up(table, self.match, self.support)

    def confidences_after_wrong(self, table: LookupTable) -> NDArray[np.float32]:
        """Calibrated confidence of each proposal of `after_wrong`, shape [FOLLOWED, N]."""
        return _looked_up(table, *self.after_wrong)


class _Logged(NamedTuple):
    """A proposal as it is logged: of nothing, match and support are 0 and the token is -1."""

    match: int
    support: int
    correct: bool
    token: int


def _proposed(lookup: ContextLookup, pending: Sequence[int], choice: int) -> _Logged:
    """What the lookup proposes behind pending tokens of the text, and whether the base chooses it too."""
    proposal = lookup.propose(pending)
    if proposal is None:
        return _Logged(0, 0, False, -1)
    return _Logged(proposal.match, proposal.support, proposal.token == choice, proposal.token)


def _followed(lookup: ContextLookup, newest: int) -> tuple[tuple[int, ...], ...]:
    """Match and support of the `FOLLOWED` proposals after the one for `newest`; each continues the ones before it."""
    followed: list[tuple[int, int]] = []
    pending = [newest]
    while len(followed) <= FOLLOWED and (proposal := lookup.propose(pending)) is not None:
        followed.append((proposal.match, proposal.support))
        pending.append(proposal.token)
    followed += [(0, 0)] * (1 + FOLLOWED - len(followed))
    return tuple(zip(*followed[1:], strict=True))


def _looked_up(table: LookupTable, match: NDArray[np.int64], support: NDArray[np.int64]) -> NDArray[np.float32]:
    cells = np.array(table.rows)[np.maximum(match, 1) - 1, support]
    return np.where(match > 0, cells, 0.0).astype(np.float32)


def _share(correct: NDArray[np.bool_], prior: float) -> float:
    return (float(correct.sum()) + PRIOR_WEIGHT * prior) / (len(correct) + PRIOR_WEIGHT)
