"""Who drafts: exit heads with their temperatures, the lookup at depth 0, or nobody. Knows no tree and no target."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.head_memory import read_all
from runtime.drafting.heads import MAX_AGE, HeadContext
from runtime.drafting.lookup import LookupTable
from runtime.drafting.temperature import TemperatureSchedule

# Tokens with their confidence, most confident first.
Proposals = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A question to an exit: up to `count` tokens to follow each of some pending tokens of one request."""

    state: DecodeState
    layer: int
    nodes: Sequence[int]
    count: int


class Drafter(Protocol):
    """Proposes successors of pending tokens from their hidden states at an exit layer."""

    @property
    def exit_layers(self) -> list[int]:
        """Exit layers that can be asked, shallowest first."""

    @property
    def modules(self) -> Iterable[nn.Module]:
        """Modules of its own, not the base's."""

    @property
    def watched(self) -> list[int]:
        """Exit layers whose hidden states it reads of settled positions too."""

    def on(self, layers: DecoderLayers) -> "Drafter":
        """The same drafter on the base as it is now, which may have moved to another device or dtype."""

    def propose(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> list[Proposals]:
        """Up to `count` tokens to follow each node, with calibrated confidences.

        Args:
            nodes: places of pending tokens, all as far from the root, and of the last segment, which stands at this
                depth.
        """


@dataclass(frozen=True, slots=True)
class HeadDrafter:
    """The trained exit heads with their temperatures; one device synchronisation a level.

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
    def watched(self) -> list[int]:
        """Those of heads that attend."""
        return self.heads.exit_layers if self.heads.attends else []

    @property
    def modules(self) -> Iterable[nn.Module]:
        """Those of the heads, and their copy of the base's rows."""
        return self.heads.modules

    def on(self, layers: DecoderLayers) -> "HeadDrafter":
        """The heads in the base's device and dtype, the borrowed rows taken anew."""
        return replace(self, heads=self.heads.on(layers, device=layers.device, dtype=layers.dtype))

    def propose(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> list[Proposals]:
        """As `propose_all`, for one request."""
        return self.propose_all(layer, [Ask(state, layer, nodes, count)])[0]

    @torch.inference_mode()
    def propose_all(self, layer: int, asks: Sequence[Ask]) -> list[list[Proposals]]:
        """What the lookup proposes at depth 0; elsewhere the head's likeliest tokens, at its exit's temperature."""
        if layer == 0:
            return [[self._look_up(ask.state, node) for node in ask.nodes] for ask in asks]
        temperature, most = self.temperatures[layer], max(ask.count for ask in asks)
        if self.heads.attends:
            found = self.heads.of_states(layer, self._attend(layer, asks), temperature, most)
        else:
            hidden = _joined([ask.state.hidden(ask.nodes) for ask in asks])
            parts = [head_context(ask.state, ask.nodes) for ask in asks]
            context = parts[0] if len(parts) == 1 else HeadContext.join(parts)
            found = self.heads.best(layer, hidden, context, temperature, most)
        rows = iter(found)
        return [[next(rows)[: ask.count] for _ in ask.nodes] for ask in asks]

    def _attend(self, layer: int, asks: Sequence[Ask]) -> Tensor:
        """States [N, D] of a head with keys of its own; it reads all pending tokens that it has not read."""
        memories = [self.heads.memory(layer, ask.state.memories) for ask in asks]
        levels = []
        for memory, ask in zip(memories, asks, strict=True):
            memory.settle(ask.state.unread.pop(layer, ()))
            unread, paths = memory.unread(len(ask.state.pending)), ask.state.paths
            levels.append([list(level) for _, level in groupby(unread, key=lambda node: len(paths[node]))])
        while any(levels):  # a child reads what its parent became
            group = [(memories[index], asks[index].state, own.pop(0)) for index, own in enumerate(levels) if own]
            readings = [
                memory.reading(nodes, state.paths, (state.at_exit(layer, nodes), state.embeddings(nodes)), state.deep)
                for memory, state, nodes in group
            ]
            made = read_all([memory for memory, _, _ in group], readings)
            for (memory, _, nodes), states in zip(group, made, strict=True):
                memory.take(nodes, states)
        return _joined([memory.states(ask.nodes) for memory, ask in zip(memories, asks, strict=True)])

    def _look_up(self, state: DecodeState, node: int) -> Proposals:
        proposal = state.lookup.propose(state.tokens(node))
        if proposal is None or self.lookup is None:
            return []
        return [(proposal.token, self.lookup.confidence(proposal))]


class NoDrafter:
    """Nobody: requests decode together without an adapter."""

    def __init__(self) -> None:
        self.exit_layers: list[int] = []
        self.watched: list[int] = []
        self.modules: list[nn.Module] = []

    def on(self, layers: DecoderLayers) -> "NoDrafter":
        """There is nothing to move."""
        return self

    def propose(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> list[Proposals]:
        """Nothing; there is no exit to ask."""
        return [[] for _ in nodes]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several requests, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def head_context(state: DecodeState, nodes: Sequence[int]) -> HeadContext:
    """What heads may read of N pending tokens; the settled text ends as many positions before each of them."""
    embedding, age = state.embeddings(nodes), len(state.paths[nodes[0]])
    if state.deep is None or age > MAX_AGE:
        age, deep = 0, torch.zeros_like(embedding)
    else:
        deep = state.deep.to(embedding.device).expand(len(nodes), -1)
    # made on the device: copying numbers there would wait for the layers before
    return HeadContext(embedding, deep, torch.full((len(nodes),), age, device=embedding.device))
