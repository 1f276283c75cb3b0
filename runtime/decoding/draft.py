"""Drafting: the newest token climbs from exit to exit until one is sure enough; the draft becomes the newest.

Source: SpecBound (arXiv 2604.12247): annealed confidence threshold and bounded speculation. Knows nothing of the
target's choices.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.drafting.heads import MAX_AGE, DraftUnembedding, ExitHeads, HeadContext
from runtime.drafting.lookup import LookupTable
from runtime.drafting.policy import SpeculationBounds
from runtime.drafting.temperature import TemperatureSchedule, confidence
from runtime.exact.packed import pack_in_place


class Drafter(Protocol):
    """Proposes the newest token's successor from its hidden state at an exit layer."""

    @property
    def exit_layers(self) -> list[int]:
        """Exit layers that can be asked, shallowest first."""

    def on(self, layers: DecoderLayers) -> "Drafter":
        """The same drafter on the base as it is now, which may have moved to another device or dtype."""

    def propose(self, layer: int, state: DecodeState) -> tuple[int, float]:
        """Token id and calibrated confidence; the newest pending token stands at this depth or deeper."""


@dataclass(frozen=True, slots=True)
class HeadDrafter:
    """The trained exit heads with their temperatures; one device synchronisation a proposal.

    Attributes:
        heads: on the base's device and dtype.
        unembedding: the base's frozen rows for the draft vocabulary.
        draft_to_target: shape [V], int64; None for the whole vocabulary.
        temperatures: exit temperatures.
        lookup: confidence of the depth-0 exit; None switches it off.
    """

    heads: ExitHeads
    unembedding: DraftUnembedding
    draft_to_target: list[int] | None
    temperatures: TemperatureSchedule
    lookup: LookupTable | None = None

    @property
    def exit_layers(self) -> list[int]:
        """Exit layers of the heads, after depth 0 where the lookup is on."""
        return self.heads.exit_layers if self.lookup is None else [0, *self.heads.exit_layers]

    def on(self, layers: DecoderLayers) -> "HeadDrafter":
        """The heads in the base's device and dtype, the borrowed rows taken anew."""
        rows = None if self.draft_to_target is None else torch.tensor(self.draft_to_target)
        heads = self.heads.to(device=layers.device, dtype=layers.dtype)
        unembedding = DraftUnembedding(layers, rows)
        pack_in_place([*heads.modules(), *([] if rows is None else [unembedding.rows])])  # else the base's own
        return replace(self, heads=heads, unembedding=unembedding)

    @torch.inference_mode()
    def propose(self, layer: int, state: DecodeState) -> tuple[int, float]:
        """What the lookup proposes at depth 0; elsewhere the head's most likely token, at its exit's temperature."""
        if layer == 0:
            return self._look_up(state)
        logits = self.heads.logits(layer, state.newest[0], head_context(state), self.unembedding)[0].float()
        best = logits.argmax()
        sure, index = torch.stack([confidence(logits, self.temperatures[layer]), best.float()]).tolist()
        token = int(index)
        return (token if self.draft_to_target is None else self.draft_to_target[token]), sure

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
        found = _find_exit(state, drafter, bounds, bounds.exits(drafter.exit_layers, survival))
        if found is None:
            draft.hard = bounds.runs_layers(survival)
            break
        token, layer, sure = found
        survival *= sure
        draft.tokens.append(token)
        draft.exit_layers.append(layer)
        draft.confidences.append(sure)
        state.push(token)
        if token in stop_tokens:
            break
    return draft


def _find_exit(
    state: DecodeState, drafter: Drafter, bounds: SpeculationBounds, exits: list[int]
) -> tuple[int, int, float] | None:
    """Draft, exit layer and confidence of the newest token; None where no exit is sure: a hard token."""
    for layer in exits:
        state.advance(layer)
        token, sure = drafter.propose(layer, state)
        if bounds.accepts(layer, sure):
            return token, layer, sure
    return None
