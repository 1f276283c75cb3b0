"""Drafting: the newest token climbs from exit to exit until one is confident enough; the draft becomes the newest.

Source: SpecBound (arXiv 2604.12247): annealed confidence threshold and bounded speculation. Knows nothing of the
target's choices.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import MAX_AGE, HeadContext
from runtime.drafting.lookup import LookupTable
from runtime.drafting.policy import SpeculationBounds
from runtime.drafting.temperature import TemperatureSchedule


class Drafter(Protocol):
    """Proposes the newest token's successor from its hidden state at an exit layer."""

    @property
    def exit_layers(self) -> list[int]:
        """Exit layers that can be asked, shallowest first."""

    @property
    def modules(self) -> Iterable[nn.Module]:
        """Modules of its own, not the base's."""

    def on(self, layers: DecoderLayers) -> "Drafter":
        """The same drafter on the base as it is now, which may have moved to another device or dtype."""

    def propose(self, layer: int, state: DecodeState) -> tuple[int, float]:
        """Token id and calibrated confidence; the newest pending token stands at this depth or deeper."""


@dataclass(frozen=True, slots=True)
class HeadDrafter:
    """The trained exit heads with their temperatures; one device synchronisation a proposal.

    Attributes:
        heads: on the base's device and dtype.
        temperatures: exit temperatures.
        lookup: confidence of the depth-0 exit; None switches it off.
    """

    heads: DraftHeads
    temperatures: TemperatureSchedule
    lookup: LookupTable | None = None

    @property
    def exit_layers(self) -> list[int]:
        """Exit layers of the heads, after depth 0 where the lookup is on."""
        return self.heads.exit_layers if self.lookup is None else [0, *self.heads.exit_layers]

    @property
    def modules(self) -> Iterable[nn.Module]:
        """Those of the heads, and their copy of the base's rows."""
        return self.heads.modules

    def on(self, layers: DecoderLayers) -> "HeadDrafter":
        """The heads in the base's device and dtype, the borrowed rows taken anew."""
        return replace(self, heads=self.heads.on(layers, device=layers.device, dtype=layers.dtype))

    @torch.inference_mode()
    def propose(self, layer: int, state: DecodeState) -> tuple[int, float]:
        """What the lookup proposes at depth 0; elsewhere the head's most likely token, at its exit's temperature."""
        if layer == 0:
            return self._look_up(state)
        return self.heads.best(layer, state.newest[0], head_context(state), self.temperatures[layer])

    def _look_up(self, state: DecodeState) -> tuple[int, float]:
        proposal = state.lookup.propose(state.pending)
        if proposal is None or self.lookup is None:
            return 0, 0.0
        return proposal.token, self.lookup.confidence(proposal)


def head_context(state: DecodeState) -> HeadContext:
    """What heads may read of the newest pending token, N = 1; the settled text ends so many positions before it."""
    assert state.embedding is not None
    embedding, age = state.embedding[0], len(state.pending)
    if state.deep is None or age > MAX_AGE:
        return HeadContext(embedding, torch.zeros_like(embedding), _filled(0, embedding.device))
    return HeadContext(embedding, state.deep[None].to(embedding.device), _filled(age, embedding.device))


def _filled(number: int, device: torch.device) -> torch.Tensor:
    """One number as a tensor [1], int64, made on the device: copying it there would wait for the layers before."""
    return torch.full((1,), number, device=device)


@dataclass(slots=True)
class Draft:
    """Drafted tokens, exit layer and confidence of each, and whether the draft ended at a hard token."""

    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    hard: bool = False


def draft_tokens(
    state: DecodeState,
    drafter: Drafter,
    bounds: SpeculationBounds,
    *,
    limit: int,
    stop_tokens: Collection[int],
) -> Draft:
    """Draft up to `limit` tokens after the newest pending one.

    Args:
        state: has at least one pending token; drafts are pushed onto it.
        limit: most drafts to make.
        stop_tokens: ids after which nothing is drafted, because the text would end there.
    """
    draft = Draft()
    survival = 1.0
    while len(draft.tokens) < limit:
        chosen = _find_exit(state, drafter, bounds, bounds.exits(drafter.exit_layers, survival))
        if chosen is None:
            draft.hard = bounds.runs_layers(survival)
            break
        token, layer, chance = chosen
        survival *= chance
        draft.tokens.append(token)
        draft.exit_layers.append(layer)
        draft.confidences.append(chance)
        state.push(token)
        if token in stop_tokens:
            break
    return draft


def _find_exit(
    state: DecodeState, drafter: Drafter, bounds: SpeculationBounds, exits: list[int]
) -> tuple[int, int, float] | None:
    """Draft, exit layer and confidence of the newest token; None where no exit is confident enough: a hard token."""
    for layer in exits:
        state.advance(layer)
        token, chance = drafter.propose(layer, state)
        if bounds.accepts(layer, chance):
            return token, layer, chance
    return None
