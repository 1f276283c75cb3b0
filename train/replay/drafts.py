"""What rounds would draft, wherever in logged text they started. The runtime's own policy code decides, on arrays."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from runtime.drafting.policy import SpeculationBounds
from runtime.errors import ConfigError
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.rounds import MAX_DRAFTS, Ints, Kinds, Small

Sure = NDArray[np.float32]
NOWHERE = -1


class Drafting:
    """A round from each of N positions, question by question, as far as the newest bounds asked.

    Bounds that differ in width or survival stop alone give the same answers, so these are kept from one to the next.

    Args:
        traces: the text.
        costs: of the kinds of rounds.

    Attributes:
        kinds: of rounds with the exits of the newest bounds.
        after: kind of the round from each position after so many questions, shape [MAX_DRAFTS + 1, N].
        correct: drafts of each round before the first wrong one, shape [N].
    """

    def __init__(self, traces: Traces, costs: CostTable) -> None:
        self._traces, self._costs = traces, costs
        self._remaining = traces.remaining
        # What is no number never fires, but can be multiplied.
        self._confidence = np.nan_to_num(traces.confidence, nan=0.0)
        self._all_kinds: dict[tuple[int, ...], Kinds] = {}
        self._thresholds: dict[int, float] | None = None
        length = len(traces)
        self.after: Ints = np.zeros((MAX_DRAFTS + 1, length), dtype=np.int64)
        self._survival = np.ones((MAX_DRAFTS + 1, length))  # before each question, as is the next
        self._runs_none = np.zeros((MAX_DRAFTS, length), dtype=bool)
        behind = np.zeros((0, length), dtype=np.float32) if traces.after_wrong is None else traces.after_wrong
        behind = behind[:MAX_DRAFTS]
        self._after_wrong = np.pad(behind, ((0, MAX_DRAFTS - len(behind)), (0, 0)))

    def questions(self, bounds: SpeculationBounds) -> Small:
        """How many questions these bounds let the round from each position ask, shape [N].

        Raises:
            ConfigError: more drafts than can be replayed.
        """
        most = bounds.max_draft_tokens
        if most > MAX_DRAFTS:
            raise ConfigError(f"{most} drafts a round are too many to replay: expected at most {MAX_DRAFTS}")
        exits = tuple(bounds.exits(self._traces.layers))
        thresholds = {layer: bounds.threshold(layer) for layer in exits}
        if thresholds != self._thresholds:
            self._begin(bounds, exits)
            self._thresholds = thresholds
        limits = np.array([bounds.draft_limit(remaining) for remaining in range(most + 2)], dtype=np.int8)
        limit = limits.take(np.minimum(self._remaining, most + 1))
        most = int(limit.max())
        while self._asked < most:
            self._ask()
        if bounds.runs_layers(0.0):
            return limit
        going, asked = np.ones(len(limit), dtype=bool), np.zeros_like(limit)
        survival = self._survival[:most]
        may_ask = bounds.drafts_on(survival) & (bounds.runs_layers(survival) | self._runs_none[:most])
        for may in may_ask:
            going &= may
            asked += going
        return np.minimum(limit, asked)

    def _begin(self, bounds: SpeculationBounds, exits: tuple[int, ...]) -> None:
        """Forget what was asked. An answer, shape [A, N], is the shallowest exit that is confident."""
        if exits not in self._all_kinds:
            self._all_kinds[exits] = Kinds(exits, self._costs)
        self.kinds = self._all_kinds[exits]
        traces, shape = self._traces, self._traces.confidence.shape[1:]
        looks_up = int(0 in exits)
        answers = np.full(shape, 1 + looks_up, dtype=np.int8)
        correct, unsure = np.zeros(shape, dtype=np.int8), np.ones(shape, dtype=bool)
        confidence = np.zeros(shape, dtype=np.float32)
        for layer in exits[looks_up:]:
            row = traces.layers.index(layer)
            # Arithmetic, because `np.where` takes ten times as long where firing is as good as random.
            fires = unsure & bounds.accepts(layer, traces.confidence[row])
            unsure ^= fires
            answers += unsure
            correct |= fires & traces.correct[row]
            confidence += fires * self._confidence[row]
        self._heads = answers, confidence
        if looks_up:
            fires = bounds.accepts(0, traces.confidence[0])
            answers = fires + answers * ~fires
            correct = (fires & traces.correct[0]) + correct * ~fires
            confidence = fires * self._confidence[0] + confidence * ~fires
        self._answers, self._right, self._sure = answers, correct, confidence
        self._accepts_lookup = partial(bounds.accepts, 0)
        self._follows = bool(looks_up) and traces.after_wrong is not None
        self._asked = 0
        self._all_right = np.ones(shape[1], dtype=np.int8)
        self._wrong = np.full(shape[1], NOWHERE)  # position of the wrong draft by lookup that the round goes on behind
        self.correct: Small = np.zeros(shape[1], dtype=np.int8)

    def _ask(self) -> None:
        """One question more, where the text is long enough; of the others nothing is read."""
        asked, age = self._asked, min(self._asked, len(self._answers) - 1)
        answers, confidence = self._answers[age, asked:], self._sure[age, asked:]
        here = slice(len(answers))
        if self._follows:
            answers, confidence = self._behind_wrong(asked, age, answers, confidence)
        self.after[asked + 1, here] = self.kinds.after(self.after[asked, here], answers)
        np.multiply(self._survival[asked, here], confidence, out=self._survival[asked + 1, here])
        self._runs_none[asked, here] = (answers == 1) & (0 in self.kinds.exits)
        self._all_right[here] &= self._right[age, asked:]
        self.correct[here] += self._all_right[here]
        self._asked += 1

    def _behind_wrong(self, asked: int, age: int, answers: Small, confidence: Sure) -> tuple[Small, Sure]:
        """Answers and confidences where rounds that went on copying from the wrong place go on with that."""
        wrong = self._wrong[: len(answers)]
        lost = np.flatnonzero(wrong != NOWHERE)
        at = wrong.take(lost)
        copied = self._after_wrong.take((lost + asked - 1 - at) * len(self._wrong) + at)
        goes_on = self._accepts_lookup(copied)
        by_heads, sure_heads = (part[age].take(lost + asked) for part in self._heads)
        answers, confidence = answers.copy(), confidence.copy()
        answers[lost] = goes_on + by_heads * ~goes_on
        confidence[lost] = goes_on * copied + sure_heads * ~goes_on
        wrong[lost[~goes_on]] = NOWHERE
        newly = np.flatnonzero((answers == 1) & (self._right[age, asked:] == 0) & (wrong == NOWHERE))
        wrong[newly] = newly + asked
        return answers, confidence
