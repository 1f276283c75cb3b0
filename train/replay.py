"""Replay: what a policy would do on logged text, and how fast, without a model.

On a right prefix the log holds what the runtime sees, and the runtime's own policy code decides, so accepted
lengths are those of a run. What follows a wrong draft is not in the log: it only costs time, and is guessed from
the text's own confidences. Knows no model and does not search.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ConfigError
from runtime.policy import SpeculationBounds
from train.costs import CostTable
from train.traces import Traces

Ints = NDArray[np.int64]
# A round is one number: a digit of base E + 2 for each draft, and this many values for what was accepted.
MAX_DRAFTS = 32


@dataclass(frozen=True, slots=True)
class Replayed:
    """Totals of a replay.

    Attributes:
        rounds: verification passes.
        drafted, accepted: drafts by source.
        hard_tokens: rounds that ended at a token no exit was sure of.
        emitted_by_text, ms_by_text, plain_by_text: tokens after the first, their predicted cost, and that of stock
            `generate`, of each text, shape [texts].
    """

    rounds: int
    drafted: Counter[int]
    accepted: Counter[int]
    hard_tokens: int
    emitted_by_text: Ints
    ms_by_text: NDArray[np.float64]
    plain_by_text: NDArray[np.float64]

    @property
    def emitted(self) -> int:
        """Tokens."""
        return int(self.emitted_by_text.sum())

    @property
    def mean_accepted_length(self) -> float:
        """Tokens emitted per verification pass, the bonus counted."""
        return self.emitted / max(1, self.rounds)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.accepted.total() / max(1, self.drafted.total())

    @property
    def ms_per_token(self) -> float:
        """Predicted milliseconds a token."""
        return float(self.ms_by_text.sum()) / max(1, self.emitted)

    @property
    def tokens_per_second(self) -> float:
        """Predicted."""
        return 1000.0 / max(1e-9, self.ms_per_token)

    @property
    def speedup(self) -> float:
        """Predicted, over stock `generate`."""
        return float(self.plain_by_text.sum() / self.ms_by_text.sum())

    def speedup_interval(self, *, level: float = 0.95, draws: int = 1000) -> tuple[float, float]:
        """Bootstrap interval of the speed-up, over texts; nearly the same text twice is one piece of evidence."""
        texts = len(self.ms_by_text)
        chosen = np.random.default_rng(0).integers(texts, size=(draws, texts))
        ratios = self.plain_by_text[chosen].sum(axis=1) / self.ms_by_text[chosen].sum(axis=1)
        low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def describe(self, costs: CostTable) -> dict[str, Any]:
        """As JSON values, for `calibration.json`; `costs` are those it was predicted with."""
        low, high = self.speedup_interval()
        return {
            "mean_accepted_length": self.mean_accepted_length,
            "acceptance_rate": self.acceptance_rate,
            "drafted": {str(layer): count for layer, count in sorted(self.drafted.items())},
            "accepted": {str(layer): count for layer, count in sorted(self.accepted.items())},
            "predicted_speedup": self.speedup,
            "predicted_speedup_interval": [low, high],
            "costs": dict(costs.conditions) or "layer counts, not measured times",
        }


class Replayer:
    """Decodes logged texts under any bounds; what kinds of rounds cost is worked out once.

    Args:
        traces: what to decode.
        costs: of the machine that the speed is predicted for.
    """

    def __init__(self, traces: Traces, costs: CostTable) -> None:
        self.traces = traces
        self.costs = costs
        self._kinds: dict[tuple[tuple[int, ...], int], list[float]] = {}
        plain = costs.plain + costs.plain_context * traces.context
        plain[traces.starts] = 0.0  # the prompt's own forward emits the first token, in both ways
        self._plain = np.bincount(traces.sequence, weights=plain).astype(np.float64)

    def run(self, bounds: SpeculationBounds) -> Replayed:
        """Totals of decoding every text."""
        traces, exits = self.traces, tuple(bounds.exits(self.traces.layers))
        codes = _rounds(traces, bounds, exits)
        newest = _chain(traces, codes % MAX_DRAFTS)
        found, which, times = np.unique(codes[newest], return_inverse=True, return_counts=True)
        kinds = np.array([self._kind(exits, code) for code in found.tolist()]).reshape(-1, 4 + 2 * len(exits))
        price, by_context, emitted = kinds[:, 0], kinds[:, 1], kinds[:, 2]
        hard_tokens, *counts = (times @ kinds[:, 3:]).astype(int).tolist()
        text, texts = traces.sequence[newest], traces.num_sequences
        ms = price[which] + by_context[which] * traces.context[newest]
        return Replayed(
            rounds=len(newest),
            drafted=+Counter(dict(zip(exits, counts[: len(exits)], strict=True))),
            accepted=+Counter(dict(zip(exits, counts[len(exits) :], strict=True))),
            hard_tokens=hard_tokens,
            emitted_by_text=np.bincount(text, weights=emitted[which], minlength=texts).astype(np.int64),
            ms_by_text=np.bincount(text, weights=ms, minlength=texts).astype(np.float64),
            plain_by_text=self._plain,
        )

    def _kind(self, exits: tuple[int, ...], code: int) -> list[float]:
        """Of one kind of round: ms, ms by token of context, tokens, whether hard, drafted and accepted by source."""
        if (exits, code) not in self._kinds:
            kind = Round.decode(code, exits)
            sources = kind.drafts, kind.drafts[: kind.accepted]
            counts = [float(drafts.count(layer)) for drafts in sources for layer in exits]
            self._kinds[exits, code] = [*kind.price(self.costs), kind.accepted + 1.0, float(kind.hard), *counts]
        return self._kinds[exits, code]


@dataclass(frozen=True, slots=True)
class Round:
    """One kind of round: what was drafted where, and how much of it was right. Few kinds make up a text.

    Attributes:
        exits: sources that were asked, shallowest first.
        drafts: source of each draft.
        hard: whether it ended at a token no exit was sure of.
        accepted: drafts accepted.
    """

    exits: tuple[int, ...]
    drafts: tuple[int, ...]
    hard: bool
    accepted: int

    @classmethod
    def decode(cls, code: int, exits: tuple[int, ...]) -> "Round":
        """From `_rounds`: the last digit counts what was accepted; 1 to E name a source, E + 1 a hard token."""
        code, accepted = divmod(code, MAX_DRAFTS)
        digits = []
        while code:
            code, digit = divmod(code, len(exits) + 2)
            digits.append(digit - 1)
        hard = bool(digits) and digits[0] == len(exits)
        return cls(exits, tuple(exits[level] for level in reversed(digits[hard:])), hard, accepted)

    def price(self, costs: CostTable) -> tuple[float, float]:
        """Milliseconds with an empty context, and what every token of context adds."""
        depths = sorted({0, *self.exits, costs.num_hidden_layers})
        pending = dict.fromkeys(depths, 0)  # depth -> pending tokens there
        total, by_context = costs.round + costs.token * (self.accepted + 1), 0.0

        def advance(to: int) -> None:
            """As `DecodeState.advance`: tokens that lack a layer run through it in one block."""
            nonlocal total, by_context
            for depth, above in pairwise(depths):
                width = pending[depth]
                if above > to or width == 0:
                    continue
                total += (above - depth) * costs.block(costs.layer, width)
                by_context += (above - depth) * costs.block(costs.layer_context, width)
                pending[above] += width
                pending[depth] = 0

        for layer in [*self.drafts, *([self.exits[-1]] if self.hard and self.exits else [])]:
            pending[0] += 1
            asked = self.exits[: self.exits.index(layer) + 1]
            total += sum(costs.lookup if exit_layer == 0 else costs.head for exit_layer in asked)
            advance(layer)
        pending[0] += not self.hard or not self.exits
        advance(costs.num_hidden_layers)
        return total + costs.block(costs.unembedding, len(self.drafts) + 1), by_context


def _rounds(traces: Traces, bounds: SpeculationBounds, exits: tuple[int, ...]) -> Ints:
    """The round that would start at each position, as a number that `Round.decode` reads, shape [N].

    Where the survival stop leaves the lookup alone, and it is not sure, that question is not in the number.
    """
    length, hard = len(traces), len(exits)
    runs_none = np.array([*(layer == 0 for layer in exits), False])
    drafts = traces.sure.shape[1]  # what differs from the first draft of a round to the last
    level = np.full((drafts, length), hard)
    sure, right = np.zeros((drafts, length)), np.zeros((drafts, length), dtype=bool)
    for index in reversed(range(hard)):  # the shallowest that is sure has the last word
        row = traces.layers.index(exits[index])
        fires = bounds.accepts(exits[index], traces.sure[row])
        level = np.where(fires, index, level)
        sure, right = np.where(fires, traces.sure[row], sure), np.where(fires, traces.right[row], right)
    most = bounds.max_draft_tokens
    if (hard + 2.0) ** (most + 1) * MAX_DRAFTS >= 2.0**63:
        raise ConfigError(f"{most} drafts a round from {hard} sources are too many to replay: expected fewer")
    limits = np.array([bounds.draft_limit(remaining) for remaining in range(most + 2)])
    limit = limits[np.minimum(traces.remaining, most + 1)]
    codes = np.zeros(length, dtype=np.int64)
    accepted = np.zeros(length, dtype=np.int64)
    correct = np.ones(length, dtype=bool)
    survival = np.ones(length)
    drafting = np.arange(length)  # fewer with every step
    for step in range(most):
        drafting = drafting[step < limit[drafting]]
        age = min(step, drafts - 1)
        source = level[age, drafting + step]
        may = bounds.runs_layers(survival[drafting]) | runs_none[source]
        drafting, source = drafting[may], source[may]
        codes[drafting] = codes[drafting] * (hard + 2) + source + 1
        drafting = drafting[source < hard]
        correct[drafting] &= right[age, drafting + step]
        accepted[drafting] += correct[drafting]
        survival[drafting] *= sure[age, drafting + step]
    return codes * MAX_DRAFTS + accepted


def _chain(traces: Traces, accepted: Ints) -> Ints:
    """Positions where a round does start: each text's second, the first token being the prompt's own forward's, and
    from there always the one after what was emitted."""
    length = len(traces)
    first = traces.starts[traces.remaining[traces.starts] > 1] + 1
    step = np.minimum(np.arange(length) + accepted + 1, length)
    step = np.append(np.where(step < np.arange(length) + traces.remaining, step, length), length)
    visited = np.zeros(length + 1, dtype=bool)
    visited[first] = True
    while bool((step[first] < length).any()):  # each time twice as many rounds further
        visited[step[visited.nonzero()[0]]] = True
        step = step[step]
    return visited[:length].nonzero()[0]
