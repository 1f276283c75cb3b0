"""Checks that the runtime agrees with replay on the same held-out text; if they differ, nothing is published.

The bounds are chosen by replay, so a difference would make every predicted figure wrong. Reads no files.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from runtime.decoding.cache import KVCache
from runtime.decoding.drafter import Drafter, Proposals
from runtime.decoding.families import CACHE
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.request import Request
from runtime.decoding.rounds import run_to_end
from runtime.decoding.state import DecodeState
from runtime.drafting.policy import SpeculationBounds
from runtime.errors import SpecBoundError
from runtime.exact.execution import ExecutionPolicy, execution
from runtime.stats import SpeculationStats
from train.calibration.traces import Traces
from train.features.spread import first_says
from train.replay.costs import CostTable
from train.replay.replay import Replayer

# Enough text to see a fault, and few enough tokens to decode in seconds. A base that is spread gathers every layer for
# every round, from processes that may wait for a core: there a quarter must do.
TOKENS, TOKENS_SPREAD = 600, 150
# Features are logged in batches but drafts are made one by one, so a few confidences may cross a threshold.
TOLERANCE, FREE_ROUNDS = 0.02, 3


def check_agreement(
    layers: DecoderLayers,
    drafter: Drafter,
    bounds: SpeculationBounds,
    rows: Sequence[Any],
    told: Traces,
    *,
    spread: bool = False,
) -> dict[str, Any]:
    """Compare mean accepted length by replay and by a run on the first texts; returns both as JSON values.

    Args:
        rows: (prompt ids, response ids) of every traced text, in order.
        told: traces of them whose drafts are right where they are the text's own token, as they are in the run.
        spread: whether each process holds only a part of the base; all of them must call it then.

    Raises:
        SpecBoundError: the two differ by more than 2 %.
    """
    lengths = np.array([len(response) for _, response in rows])
    tokens = np.cumsum(lengths)
    number = min(len(rows), int(np.searchsorted(tokens, TOKENS_SPREAD if spread else TOKENS)) + 1)
    measured = run_on(layers, Led(drafter) if spread else drafter, bounds, rows[:number])
    counted = CostTable.layer_passes(layers.num_layers)
    first = told.beginnings(np.where(np.arange(len(rows)) < number, lengths, 0))
    replayed = Replayer(first, counted).run(bounds).mean_accepted_length
    ran = measured.mean_accepted_length
    compared = {"tokens": int(tokens[number - 1]), "by_replay": round(replayed, 4), "by_run": round(ran, 4)}
    if not agrees(compared):
        raise SpecBoundError(
            f"on the same {compared['tokens']} tokens replay accepts {replayed:.3f} tokens a round and the"
            f" runtime {ran:.3f}, more than {TOLERANCE:.0%} apart: the adapter is not published, because"
            " its predicted figures would be wrong; please report this"
        )
    return compared


def agrees(compared: Mapping[str, Any]) -> bool:
    """Whether replay and run need nearly the same number of rounds; `compared` is what `check_agreement` returns."""
    tokens, by_replay, by_run = compared["tokens"], compared["by_replay"], compared["by_run"]
    if not (by_replay > 0 and by_run > 0):
        return False
    rounds = tokens / by_run
    return bool(abs(rounds - tokens / by_replay) <= max(FREE_ROUNDS, TOLERANCE * rounds))


@torch.no_grad()
def run_on(
    layers: DecoderLayers, drafter: Drafter, bounds: SpeculationBounds, rows: Sequence[Any]
) -> SpeculationStats:
    """Run the runtime's own rounds on known texts, as if the base chose each of their tokens."""
    stats = SpeculationStats()
    model = layers.model
    for prompt, response in rows:
        prefix = DynamicCache()
        with layers.watching(drafter.watched) as seen:
            logits = model(
                input_ids=torch.tensor([list(prompt)], device=layers.device), use_cache=True, **{CACHE: prefix}
            ).logits[:, -1]
        cache = KVCache.from_dynamic(prefix, len(prompt) + len(response) + bounds.max_draft_tokens)
        state = DecodeState(layers, cache, list(prompt), prompt=seen)
        with execution(model, ExecutionPolicy.batched()):
            run_to_end(Request(state, bounds, Told(response), stats), logits, drafter)
    return stats


class Led:
    """A drafter whose proposals are those of the first process on all of them, so that all go through equal rounds."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.exit_layers, self.watched, self.modules = drafter.exit_layers, drafter.watched, drafter.modules

    def on(self, layers: DecoderLayers) -> "Led":
        """The same on the base as it is now."""
        return Led(self.drafter.on(layers))

    def propose(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> list[Proposals]:
        """As the first process proposes."""
        mine = self.drafter.propose(layer, state, nodes, count)
        return first_says(lambda: mine)


class Told:
    """Emits a known text, whatever the logits are."""

    stop_tokens: Collection[int] = ()

    def __init__(self, response: Sequence[int]) -> None:
        self._tokens = [int(token) for token in response]
        self._emitted = 0

    def emit(self, logits: torch.Tensor) -> tuple[int, bool]:
        """Return the next token of the text, and whether it is the last."""
        token = self._tokens[self._emitted]
        self._emitted += 1
        return token, self._emitted == len(self._tokens)

    @property
    def remaining(self) -> int:
        """Tokens still to come."""
        return len(self._tokens) - self._emitted
