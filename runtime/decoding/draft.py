"""Drafting: tokens climb from exit to exit until a source is confident enough; its drafts follow them, level by level.

Source: SpecBound (arXiv 2604.12247): annealed confidence threshold and bounded speculation, there for a chain. Knows
nothing of the target's choices.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol

import torch
from torch import nn

from runtime.decoding.accept import Accepted
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.drafting.branches import Branch, merge
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import MAX_AGE, HeadContext
from runtime.drafting.lookup import LookupTable
from runtime.drafting.policy import SpeculationBounds
from runtime.drafting.temperature import TemperatureSchedule

# Tokens with their confidence, most confident first.
Proposals = list[tuple[int, float]]


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

    @torch.inference_mode()
    def propose(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> list[Proposals]:
        """What the lookup proposes at depth 0; elsewhere the head's likeliest tokens, at its exit's temperature."""
        if layer == 0:
            return [self._look_up(state, node) for node in nodes]
        if self.heads.attends:
            return self._attend(layer, state, nodes, count)
        return self.heads.best(layer, state.hidden(nodes), head_context(state, nodes), self.temperatures[layer], count)

    def _attend(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> list[Proposals]:
        """The likeliest tokens of a head with keys of its own; it reads all pending tokens that it has not read."""
        memory = self.heads.memory(layer, state.memories)
        memory.settle(state.unread.pop(layer, ()))
        for _, level in groupby(memory.unread(len(state.pending)), key=lambda node: len(state.paths[node])):
            unread = list(level)  # a child reads what its parent became
            states = state.at_exit(layer, unread), state.embeddings(unread)
            memory.read(unread, state.paths, states, state.deep)
        return self.heads.of_states(layer, memory.states(nodes), self.temperatures[layer], count)

    def _look_up(self, state: DecodeState, node: int) -> Proposals:
        proposal = state.lookup.propose(state.tokens(node))
        if proposal is None or self.lookup is None:
            return []
        return [(proposal.token, self.lookup.confidence(proposal))]


def head_context(state: DecodeState, nodes: Sequence[int]) -> HeadContext:
    """What heads may read of N pending tokens; the settled text ends as many positions before each of them."""
    embedding, age = state.embeddings(nodes), len(state.paths[nodes[0]])
    if state.deep is None or age > MAX_AGE:
        age, deep = 0, torch.zeros_like(embedding)
    else:
        deep = state.deep.to(embedding.device).expand(len(nodes), -1)
    # made on the device: copying numbers there would wait for the layers before
    return HeadContext(embedding, deep, torch.full((len(nodes),), age, device=embedding.device))


@dataclass(slots=True)
class Draft:
    """A drafted tree, in the order in which the drafts were made; a parent comes before what follows it.

    Attributes:
        tokens: ids.
        parents: of each, the place of the pending token that it follows: 0 is the newest emitted token, n + 1 the
            draft with index n.
        exit_layers: the source of each; 0 is the lookup.
        confidences: of each, given that its parent is accepted.
        hard: whether drafting ended at tokens for which no source was confident enough.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    hard: bool = False

    def add(self, branch: Branch, parent: int) -> None:
        """Add a draft."""
        assert isinstance(branch.token, int)
        self.tokens.append(branch.token)
        self.parents.append(parent)
        self.exit_layers.append(branch.layer)
        self.confidences.append(branch.confidence)


def draft_tree(
    state: DecodeState,
    drafter: Drafter,
    bounds: SpeculationBounds,
    *,
    remaining: int,
    stop_tokens: Collection[int],
) -> Draft:
    """Draft a tree behind the one pending token, level by level; the likeliest drafts of a level come first.

    Args:
        state: drafts are pushed onto it.
        remaining: tokens that may still be emitted.
        stop_tokens: ids after which nothing is drafted, because the text would end there.
    """
    draft = Draft()
    limit = bounds.draft_limit(remaining)
    level = {len(state.pending) - 1: 1.0}  # place of each token that drafts may follow -> its path chance
    for _ in range(bounds.depth_limit(remaining)):
        if not level or len(draft.tokens) >= limit:
            return draft
        followed = _branches(state, drafter, bounds, level)
        made = [
            (level[node] * branch.confidence, node, branch)
            for node, branches in followed.items()
            for branch in branches[: bounds.max_branches]
            if bounds.drafts(level[node] * branch.confidence)
        ]
        draft.hard = not any(followed.values())
        made.sort(key=lambda one: -one[0])
        level = {}
        for chance, node, branch in made[: limit - len(draft.tokens)]:
            draft.add(branch, node)
            place = state.push(draft.tokens[-1], node)
            if branch.token not in stop_tokens:
                level[place] = chance
    return draft


def _branches(
    state: DecodeState, drafter: Drafter, bounds: SpeculationBounds, level: dict[int, float]
) -> dict[int, list[Branch]]:
    """What may follow each token of a level; nothing follows a hard one."""
    followed: dict[int, list[Branch]] = {node: [] for node in level}
    open_nodes = list(level)
    for layer in bounds.exits(drafter.exit_layers):
        asked = [node for node in open_nodes if bounds.asks(layer, level[node])]
        if not asked:
            continue
        state.advance(layer)
        for node, proposals in zip(asked, drafter.propose(layer, state, asked, bounds.max_branches), strict=True):
            if proposals and bounds.accepts(layer, proposals[0][1]):
                followed[node] = merge(followed[node], proposals, layer)
                if bounds.is_sure(followed[node][0].confidence):
                    open_nodes.remove(node)
    return followed


def judged(draft: Draft, result: Accepted) -> list[tuple[int, float, bool]]:
    """The drafts that followed an accepted token: source, confidence, and whether the target chose it too."""
    path = set(result.path)
    return [
        (layer, confidence, index + 1 in path)
        for index, (parent, layer, confidence) in enumerate(
            zip(draft.parents, draft.exit_layers, draft.confidences, strict=True)
        )
        if parent in path
    ]
