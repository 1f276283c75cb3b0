"""The round: draft with the shallow layers, verify in one pass of the deep ones, accept, settle.

Source: SpecBound (arXiv 2604.12247). Knows nothing of transformers' `generate`, of files or of text.
"""

from collections.abc import Callable, Collection
from typing import Protocol

from torch import Tensor

from runtime.decoding.accept import Accepted, accept
from runtime.decoding.draft import Draft, Drafter, draft_tree, judged
from runtime.decoding.state import DecodeState
from runtime.drafting.controller import Controller
from runtime.drafting.policy import SpeculationBounds
from runtime.stats import SpeculationStats


class Emitter(Protocol):
    """Turns target logits into emitted tokens, as plain decoding does, one call a token."""

    def emit(self, logits: Tensor) -> tuple[int, bool]:
        """Choose and emit the next token from target logits [1, V]; whether generation stops with it."""

    @property
    def remaining(self) -> int:
        """How many more tokens may be emitted."""

    @property
    def stop_tokens(self) -> Collection[int]:
        """Ids that end the text."""


def speculate_round(
    state: DecodeState,
    newest: int,
    drafter: Drafter,
    bounds: SpeculationBounds,
    emitter: Emitter,
    stats: SpeculationStats,
    controller: Controller | None = None,
    on_round: Callable[[Draft, Accepted], None] | None = None,
) -> Accepted:
    """One round: emits at least one token and leaves nothing pending.

    Args:
        state: settled up to, but not including, `newest`.
        newest: the last emitted token.
        controller: may allow less than `bounds`.
        on_round: told what was drafted and what became of it, after the round's tokens were emitted.
    """
    if controller is not None:
        bounds = controller.begin(bounds)
    with stats.timing("draft"):
        state.push(newest)
        draft = draft_tree(state, drafter, bounds, remaining=emitter.remaining, stop_tokens=emitter.stop_tokens)
    with stats.timing("verify"):
        logits_TV = state.verify()[0]
    with stats.timing("emit"):
        seen: list[int] = []

        def choose(row: int) -> tuple[int, bool]:
            seen.append(row)
            return emitter.emit(logits_TV[row : row + 1])

        try:
            result = accept(draft.tokens, draft.parents, choose)
        finally:  # also where a streamer, a criterion or the user interrupts: the cache holds the path so far
            state.settle(seen)
    stats.record_round(draft.exit_layers, result.drafts, len(result.tokens), hard=draft.hard)
    if controller is not None:
        controller.end(judged(draft, result), len(result.tokens))
        stats.resting_rounds += controller.resting > 0
    if on_round is not None:
        on_round(draft, result)
    return result


def decode(
    state: DecodeState,
    prompt_logits: Tensor,
    drafter: Drafter,
    bounds: SpeculationBounds,
    emitter: Emitter,
    stats: SpeculationStats,
    controller: Controller | None = None,
    on_round: Callable[[Draft, Accepted], None] | None = None,
) -> None:
    """Emit tokens until the emitter stops.

    Args:
        state: holds the prompt.
        prompt_logits: target logits [1, V] after the prompt.
        on_round: as `speculate_round` takes it.
    """
    newest, stopped = emitter.emit(prompt_logits)
    stats.emitted += 1
    while not stopped:
        result = speculate_round(state, newest, drafter, bounds, emitter, stats, controller, on_round)
        newest, stopped = result.tokens[-1], result.stopped
