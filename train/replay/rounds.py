"""`LoggedRounds`: what a round drafts on logged text, token by token, and how many drafts are accepted."""

import numpy as np
from numpy.typing import NDArray

from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import Traces

LOOKUP = 0  # as a source
# The source of each draft, how many of them are accepted, and whether drafting ended at a hard token.
Round = tuple[tuple[int, ...], int, bool]


class TraceLists:
    """Traces as lists and bytes, which a loop reads several times as fast as arrays.

    Attributes:
        traces: the arrays.
        confidence: source -> age -> position -> confidence.
        correct: age -> source -> position -> 1 where the draft is the base's choice.
        wrong_copies: number of drafts since a wrong one of the lookup -> position of the wrong one -> confidence of
            the lookup, shape [F + 1, N]; the last row is 0 and covers all later drafts.
        wrong_copy: the same as lists.
    """

    def __init__(self, traces: Traces) -> None:
        self.traces = traces
        self.confidence = dict(zip(traces.layers, traces.confidence.tolist(), strict=True))
        by_age = np.moveaxis(traces.correct, 1, 0)
        self.correct = [dict(zip(traces.layers, _rows(correct), strict=True)) for correct in by_age]
        nothing = np.zeros((0, len(traces)), dtype=np.float32)
        logged = nothing if traces.after_wrong is None else traces.after_wrong
        self.wrong_copies = np.pad(logged, ((0, 1), (0, 0)))
        self.wrong_copy = self.wrong_copies.tolist()


class LoggedRounds:
    """Rounds on logged text, as `runtime.decoding.draft.draft_tokens` and acceptance make them with a model.

    The runtime's policy code decides which sources are asked and, for all positions at once, which confidences are
    enough. Only the survival stop is written out here as a comparison, because it is checked before every draft.

    Args:
        lists: the logged text.
        bounds: bounds on drafting.

    Attributes:
        exits: the sources that are asked, shallowest first.
    """

    def __init__(self, lists: TraceLists, bounds: SpeculationBounds) -> None:
        traces = lists.traces
        self.exits = tuple(bounds.exits(traces.layers))
        self._drafts_from = bounds.min_draft_survival  # as `SpeculationBounds.drafts_on`
        self._runs_from = max(bounds.min_survival, bounds.min_draft_survival)  # as `SpeculationBounds.runs_layers`
        self._wrong_copy = lists.wrong_copy
        self._copies_on = _rows(bounds.accepts(LOOKUP, lists.wrong_copies))
        self._follows = traces.after_wrong is not None
        # age -> (source, its confidences, which of them are enough) of each source that is asked.
        by_age: list[list[tuple[int, list[float], bytes]]] = [[] for _ in lists.correct]
        for layer in self.exits:
            enough = _rows(bounds.accepts(layer, traces.confidence[traces.layers.index(layer)]))
            for age, sources in enumerate(by_age):
                sources.append((layer, lists.confidence[layer][age], enough[age]))
        # For each draft of a round: all sources, those that need no layer, and correctness. The last age covers all
        # later drafts.
        ages = [
            (sources, sources[: self.exits.count(LOOKUP)], correct)
            for sources, correct in zip(by_age, lists.correct, strict=True)
        ]
        self._drafts = ages + ages[-1:] * min(bounds.max_draft_tokens, len(traces))

    def at(self, position: int, limit: int) -> Round:
        """The round that starts at a position.

        Args:
            limit: maximum number of drafts.
        """
        drafts: list[int] = []
        num_accepted, survival = 0, 1.0
        wrong = -1  # where a draft by lookup was wrong, if the lookup still copies from there
        for at, (sources, lookups, correct) in zip(range(position, position + limit), self._drafts, strict=False):
            runs_layers = survival >= self._runs_from
            if not runs_layers:
                sources = lookups if survival >= self._drafts_from else []
            for layer, confidence, enough in sources:
                if layer == LOOKUP and wrong >= 0:
                    behind = min(at - wrong, len(self._wrong_copy)) - 1
                    if self._copies_on[behind][wrong]:
                        survival *= self._wrong_copy[behind][wrong]
                        break
                elif enough[at]:
                    survival *= confidence[at]
                    break
            else:
                return tuple(drafts), num_accepted, runs_layers
            if layer != LOOKUP:
                wrong = -1
            if correct[layer][at]:
                num_accepted += num_accepted == len(drafts)
            elif layer == LOOKUP and self._follows and wrong < 0:
                wrong = at
            drafts.append(layer)
        return tuple(drafts), num_accepted, False


def _rows(flags: NDArray[np.bool_]) -> list[bytes]:
    """Each row of an array of bool, shape [rows, N]."""
    return [row.tobytes() for row in flags]
