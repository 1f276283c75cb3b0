"""Drafting: the newest token climbs from exit to exit until one is sure enough; the draft becomes the newest.

Source: SpecBound (arXiv 2604.12247): annealed confidence threshold and bounded speculation. Knows nothing of the
target's choices.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from runtime.heads import DraftUnembedding, ExitHeads
from runtime.policy import SpeculationBounds
from runtime.state import DecodeState
from runtime.temperature import TemperatureSchedule, confidence


class Drafter(Protocol):
    """Proposes the newest token's successor from its hidden state at an exit layer."""

    @property
    def exit_layers(self) -> list[int]:
        """Exit layers that can be asked, shallowest first."""

    def propose(self, layer: int, hidden: Tensor, embedding: Tensor) -> tuple[int, float]:
        """Token id and calibrated confidence, from hidden state and embedding [1, 1, D]."""


@dataclass(frozen=True, slots=True)
class HeadDrafter:
    """The trained exit heads with their temperatures; one device synchronisation a proposal.

    Attributes:
        heads: on the base's device and dtype.
        unembedding: the base's frozen rows for the draft vocabulary.
        draft_to_target: shape [V], int64; None for the whole vocabulary.
        temperatures: exit temperatures.
    """

    heads: ExitHeads
    unembedding: DraftUnembedding
    draft_to_target: list[int] | None
    temperatures: TemperatureSchedule

    @property
    def exit_layers(self) -> list[int]:
        """Exit layers of the heads."""
        return self.heads.exit_layers

    def propose(self, layer: int, hidden: Tensor, embedding: Tensor) -> tuple[int, float]:
        """Most likely draft token and its confidence at this exit's temperature."""
        logits = self.heads.logits(layer, hidden[0, 0], embedding[0, 0], self.unembedding).float()
        best = logits.argmax()
        sure, index = torch.stack([confidence(logits, self.temperatures[layer]), best.float()]).tolist()
        token = int(index)
        return (token if self.draft_to_target is None else self.draft_to_target[token]), sure


@dataclass(slots=True)
class Draft:
    """Drafted tokens, the exit layer of each, and whether the draft ended at a hard token."""

    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    hard: bool = False


def draft_tokens(
    state: DecodeState, drafter: Drafter, bounds: SpeculationBounds, *, limit: int, stop_tokens: Collection[int]
) -> Draft:
    """Draft up to `limit` tokens after the newest pending one.

    Args:
        state: has at least one pending token; drafts are pushed onto it.
        limit: most drafts to make.
        stop_tokens: ids after which nothing is drafted, because the text would end there.
    """
    draft = Draft()
    exits = bounds.exits(drafter.exit_layers)
    while len(draft.tokens) < limit:
        found = _find_exit(state, drafter, bounds, exits)
        if found is None:
            draft.hard = True
            break
        token, layer = found
        draft.tokens.append(token)
        draft.exit_layers.append(layer)
        state.push(torch.tensor([[token]], device=state.device))
        if token in stop_tokens:
            break
    return draft


def _find_exit(
    state: DecodeState, drafter: Drafter, bounds: SpeculationBounds, exits: list[int]
) -> tuple[int, int] | None:
    """Draft and exit layer of the newest token; None where no exit is sure: a hard token."""
    assert state.embedding is not None
    for layer in exits:
        state.advance(layer)
        token, sure = drafter.propose(layer, state.newest, state.embedding)
        if bounds.accepts(sure):
            return token, layer
    return None
