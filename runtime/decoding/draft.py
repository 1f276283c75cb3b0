"""Drafting: tokens climb from exit to exit until a source is confident enough; its drafts follow them, level by level.

Source: SpecBound (arXiv 2604.12247): annealed confidence threshold and bounded speculation, there for a chain. Knows
nothing of the target's choices.
"""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.decoding.accept import Accepted
from runtime.decoding.drafter import Ask, Drafter, HeadDrafter, Proposals
from runtime.decoding.state import DecodeState, advance_all
from runtime.drafting.branches import Branch, merge
from runtime.drafting.policy import SpeculationBounds


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


# Asks exits, takes what they propose, and ends with the tree.
Drafting = Generator[Ask, list[Proposals], Draft]


def draft_all(trees: Sequence[Drafting], drafter: Drafter) -> list[Draft]:
    """Draft trees of several requests on one base; what they ask of the same exit is asked together."""
    asks: dict[int, Ask] = {}
    drafts = [Draft() for _ in trees]

    def go_on(index: int, proposals: Any = None) -> None:
        try:
            asks[index] = trees[index].send(proposals)
        except StopIteration as end:
            drafts[index] = end.value

    for index in range(len(trees)):
        go_on(index)
    while asks:
        layer = min(ask.layer for ask in asks.values())
        group = {index: asks.pop(index) for index in list(asks) if asks[index].layer == layer}
        if layer:
            advance_all([ask.state for ask in group.values()], layer)
        for index, proposals in zip(group, _propose(drafter, layer, list(group.values())), strict=True):
            go_on(index, proposals)
    return drafts


def _propose(drafter: Drafter, layer: int, asks: Sequence[Ask]) -> list[list[Proposals]]:
    """What an exit proposes to several requests."""
    if isinstance(drafter, HeadDrafter):
        return drafter.propose_all(layer, asks)
    return [drafter.propose(layer, ask.state, ask.nodes, ask.count) for ask in asks]


def draft_tree(
    state: DecodeState,
    exit_layers: Sequence[int],
    bounds: SpeculationBounds,
    *,
    remaining: int,
    stop_tokens: Collection[int],
) -> Drafting:
    """Draft a tree behind the one pending token, level by level; the likeliest drafts of a level come first.

    Args:
        state: drafts are pushed onto it.
        exit_layers: that can be asked.
        remaining: tokens that may still be emitted.
        stop_tokens: ids after which nothing is drafted, because the text would end there.
    """
    draft = Draft()
    limit = bounds.draft_limit(remaining)
    level = {len(state.pending) - 1: 1.0}  # place of each token that drafts may follow -> its path chance
    for _ in range(bounds.depth_limit(remaining)):
        if not level or len(draft.tokens) >= limit:
            return draft
        followed = yield from _branches(state, exit_layers, bounds, level)
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
    state: DecodeState, exit_layers: Sequence[int], bounds: SpeculationBounds, level: dict[int, float]
) -> Generator[Ask, list[Proposals], dict[int, list[Branch]]]:
    """What may follow each token of a level; nothing follows a hard one."""
    followed: dict[int, list[Branch]] = {node: [] for node in level}
    open_nodes = list(level)
    for layer in bounds.exits(exit_layers):
        asked = [node for node in open_nodes if bounds.asks(layer, level[node])]
        if not asked:
            continue
        answers = yield Ask(state, layer, asked, bounds.max_branches)
        for node, proposals in zip(asked, answers, strict=True):
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
