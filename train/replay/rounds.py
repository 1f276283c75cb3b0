"""`LoggedRounds`: the tree that a round drafts on logged text, level by level, and which of its drafts are accepted.

On the accepted path the log holds what the runtime sees, so what is accepted is exact. A draft off that path is taken
to be followed by what is logged at its place in the text: that costs time, and is never accepted.
"""

from collections.abc import Hashable
from typing import NamedTuple

from runtime.drafting.branches import Branch, merge
from runtime.drafting.policy import SpeculationBounds
from train.calibration.traces import Traces

LOOKUP = 0  # as a source
LOOKED_UP, COPIED = "lookup", "copied"  # its token at a position; what it copies behind a wrong one of its own


class Level(NamedTuple):
    """One level of a round: tokens that came before it, lookups asked, and rows of each exit that was asked."""

    tokens: int
    lookups: int
    asked: tuple[tuple[int, int], ...]


class Round(NamedTuple):
    """A round: its levels, the tokens that came with the last one, sources of drafts, and whether its end was hard."""

    levels: tuple[Level, ...]
    last: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    hard: bool


class Node(NamedTuple):
    """A token that drafts may follow: its path chance, whether it is accepted, and since when the lookup copies.

    `wrong` is where a draft by lookup was wrong, if the lookup still copies from there; -1 where it does not.
    """

    chance: float
    accepted: bool
    wrong: int


class TraceLists:
    """Traces as lists, which a loop reads several times as fast as arrays.

    Attributes:
        proposals: source -> distance from the root -> position -> (token, confidence), most confident first. A token
            is `LOOKED_UP`, or the source and the place among its proposals.
        right: distance -> position -> those tokens that are the base's choice.
        copied: position of a wrong draft by lookup -> confidences of what it copies next.
        merged: position, distance, drafts of a source and sources -> what these propose together; filled as it is
            asked for.
    """

    def __init__(self, traces: Traces) -> None:
        self.traces = traces
        self.proposals = {layer: self._proposals(index) for index, layer in enumerate(traces.layers)}
        ages, length = traces.confidence.shape[1], len(traces)
        rank, shared = traces.rank.tolist(), traces.shared.tolist()
        self.right: list[list[frozenset[Hashable]]] = []
        for age in range(ages):
            chosen: list[set[Hashable]] = [set() for _ in range(length)]
            for index, layer in enumerate(traces.layers):
                for at, place in enumerate(rank[index][age]):
                    if place >= 0:
                        chosen[at].add(_name(layer, place, shared[index][age][at]))
            self.right.append([frozenset(tokens) for tokens in chosen])
        self.merged: dict[tuple[int, int, int, tuple[int, ...]], list[Branch]] = {}
        self.copied = None if traces.after_wrong is None else traces.after_wrong.T.tolist()

    def _proposals(self, index: int) -> list[list[list[tuple[Hashable, float]]]]:
        layer, ages = self.traces.layers[index], self.traces.confidence.shape[1]
        by_age = []
        for age in range(ages):
            shared = self.traces.shared[index, age].tolist()
            rows = self.traces.confidence[index, age].T.tolist()
            by_age.append(
                [
                    [(_name(layer, place, shared[at]), value) for place, value in enumerate(row) if value > 0.0]
                    for at, row in enumerate(rows)
                ]
            )
        return by_age


def _name(layer: int, place: int, shared: int) -> Hashable:
    """A proposal as a token."""
    return LOOKED_UP if layer == LOOKUP or place == shared else (layer, place)


class LoggedRounds:
    """Rounds on logged text, as `runtime.decoding.draft.draft_tree` and acceptance make them with a model.

    Args:
        lists: the logged text.
        bounds: bounds on drafting; the runtime's policy code decides.
    """

    def __init__(self, lists: TraceLists, bounds: SpeculationBounds) -> None:
        self.lists, self.bounds = lists, bounds
        self.exits = bounds.exits(lists.traces.layers)
        self._last = lists.traces.confidence.shape[1] - 1
        self._known: dict[tuple[int, int, bool, int], tuple[list[Branch], tuple[int, ...]]] = {}

    def at(self, position: int, remaining: int) -> Round:
        """The round that starts at a position, with so many tokens to emit."""
        bounds = self.bounds
        limit, came = bounds.draft_limit(remaining), 1
        levels: list[Level] = []
        drafted: list[int] = []
        accepted: list[int] = []
        hard = False
        nodes = [Node(1.0, True, -1)]
        for distance in range(bounds.depth_limit(remaining)):
            if not nodes or len(drafted) >= limit:
                break
            at, age = position + distance, min(distance, self._last)
            right = self.lists.right[age][at]
            made: list[tuple[float, Node, Branch]] = []
            asked: dict[int, int] = dict.fromkeys(self.exits, 0)
            hard = True
            for node in nodes:
                branches, layers = self._branches(at, age, node)
                for layer in layers:
                    asked[layer] += 1
                hard = hard and not branches
                for branch in branches[: bounds.max_branches]:
                    chance = node.chance * branch.confidence
                    if bounds.drafts(chance):
                        made.append((-chance, node, branch))
            lookups = asked.pop(LOOKUP, 0)
            levels.append(Level(came, lookups, tuple((layer, rows) for layer, rows in asked.items() if rows)))
            made.sort(key=lambda one: one[0])
            nodes = []
            for chance, node, branch in made[: limit - len(drafted)]:
                chosen = branch.token in right
                drafted.append(branch.layer)
                if node.accepted and chosen:
                    accepted.append(branch.layer)
                nodes.append(Node(-chance, node.accepted and chosen, self._wrong(at, node, branch, chosen)))
            came = len(nodes)
        return Round(tuple(levels), came, tuple(drafted), tuple(accepted), hard)

    def _wrong(self, at: int, node: Node, branch: Branch, chosen: bool) -> int:
        """Where the lookup went wrong on the way to a draft, if it still copies from there."""
        if branch.token == COPIED:
            return node.wrong
        return at if branch.token == LOOKED_UP and not chosen and self.lists.copied is not None else -1

    def _branches(self, at: int, age: int, node: Node) -> tuple[list[Branch], tuple[int, ...]]:
        """What may follow a token, and which sources are asked for it."""
        key = at, age, self.bounds.asks(1, node.chance), node.wrong
        if key not in self._known:
            self._known[key] = self._ask(at, age, node)
        return self._known[key]

    def _ask(self, at: int, age: int, node: Node) -> tuple[list[Branch], tuple[int, ...]]:
        bounds, branches, asked = self.bounds, list[Branch](), []
        drafting: tuple[int, ...] = ()
        for layer in self.exits:
            if not bounds.asks(layer, node.chance):
                continue
            asked.append(layer)
            copies = layer == LOOKUP and node.wrong >= 0
            proposals = self._copied(at, node.wrong) if copies else self.lists.proposals[layer][age][at]
            proposals = proposals[: bounds.max_branches]  # the runtime asks for no more
            if not proposals or not bounds.accepts(layer, proposals[0][1]):
                continue
            drafting = (*drafting, layer)
            if node.wrong >= 0:
                branches = merge(branches, proposals, layer)
            else:
                key = at, age, bounds.max_branches, drafting
                if key not in self.lists.merged:
                    self.lists.merged[key] = merge(branches, proposals, layer)
                branches = self.lists.merged[key]
            if bounds.is_sure(branches[0].confidence):
                break
        return branches, tuple(asked)

    def _copied(self, at: int, wrong: int) -> list[tuple[Hashable, float]]:
        """What the lookup proposes behind a wrong draft of its own."""
        assert self.lists.copied is not None
        confidences, behind = self.lists.copied[wrong], at - wrong - 1
        if behind >= len(confidences) or confidences[behind] <= 0.0:
            return []
        return [(COPIED, confidences[behind])]
