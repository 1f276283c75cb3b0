"""`DecodeState`: one request's cache and the tokens whose successor is not settled.

Those pending tokens are a tree: the newest emitted token, and drafts, each behind its parent. They stand at different
depths. In the order in which they came depth never rises, so the ones that lack a layer are always the last ones: a
stack of segments, deepest first, each a block of tokens at one depth.
Layers run in inference mode, which every call of a small operation feels; what was emitted leaves it as a copy.
Knows nothing of heads, confidence or policy.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.decoding.cache import Block, KVCache
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.rows import TreeRows, is_chain
from runtime.drafting.exit_head import SettledStates
from runtime.drafting.head_memory import WINDOW, HeadMemory
from runtime.drafting.lookup import ContextLookup
from runtime.drafting.prompt_states import PromptStates


@dataclass(slots=True)
class Segment:
    """Pending tokens at one depth, in the order in which they came: hidden states [1, T, D], `first` of them."""

    hidden: Tensor
    depth: int
    first: int


class DecodeState:
    """Cache and pending tokens of one request.

    Args:
        layers: the base.
        token_ids: the settled tokens as far as they are known, for the lookup.
        cache: holds the same number of rows in every layer, those of the settled tokens.
        prompt: what the prompt's forward left for heads; None where that is not known.
        position_offset: position of the first token; not 0 where the caller numbers positions another way.

    Attributes:
        length: settled tokens.
        pending: token ids; the first is the last one emitted.
        paths: of each of them, the places of the pending tokens from the first to it.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        cache: KVCache,
        token_ids: Sequence[int],
        *,
        prompt: PromptStates | None = None,
        position_offset: int = 0,
    ) -> None:
        self.layers = layers
        self.cache = cache
        self.length = cache.get_seq_length()
        self.position_offset = position_offset
        self.segments: list[Segment] = []
        self.pending: list[int] = []
        self.paths: list[tuple[int, ...]] = []
        self._fresh = 0  # the last of them, whose hidden states no layer has asked for
        self.lookup = ContextLookup(token_ids)
        self._embedded: list[Tensor] = []  # hidden states [N, D] at depth 0, of one block of tokens after the other
        self.deep: Tensor | None = None if prompt is None else prompt.top
        self._top: Tensor | None = None
        self.memories: dict[int, HeadMemory] = {}  # exit layer -> what its head keeps of this request
        # Exit layer -> settled positions that its head has not read; only of heads that attend, and bounded.
        settled = {} if prompt is None else prompt.settled
        self.unread = {layer: deque([states], maxlen=WINDOW) for layer, states in settled.items()}
        self._watched = {layer: list[Tensor]() for layer in sorted(settled)}

    def push(self, token: int, parent: int | None = None) -> int:
        """Add a pending token at depth 0; returns its place among the pending ones.

        Args:
            parent: place of the pending token that it follows; by default the last one.
        """
        place = len(self.pending)
        parent = place - 1 if parent is None else parent
        before = self.paths[parent] if place else ()
        self.pending.append(token)
        self.paths.append((*before, place))
        self._fresh += 1
        return place

    def tokens(self, node: int) -> list[int]:
        """The pending tokens on the path to a node, its own last."""
        return [self.pending[place] for place in self.paths[node]]

    def hidden(self, nodes: Sequence[int]) -> Tensor:
        """Hidden states [N, D] of pending tokens of the last segment, at the depth reached so far."""
        last = self.segments[-1]
        return _rows([last.hidden[0]], [node - last.first for node in nodes])

    def embeddings(self, nodes: Sequence[int]) -> Tensor:
        """Hidden states [N, D] at depth 0 of pending tokens that layers were asked for."""
        return _rows(self._embedded, nodes)

    def at_exit(self, layer: int, nodes: Sequence[int]) -> Tensor:
        """Hidden states [N, D] of pending tokens at an exit that they have reached, and whose head attends."""
        return _rows(self._watched[layer], nodes)

    def advance(self, depth: int) -> None:
        """Bring every pending token to at least `depth`; each layer runs once, over all tokens that lack it."""
        advance_all([self], depth)

    def blocks(self, depth: int) -> Generator[Block, Tensor, None]:
        """The blocks that bring every pending token to at least `depth`, one after the other; takes their outputs."""
        if self._fresh and depth > 0:
            self._embed()
        while self.segments and self.segments[-1].depth < depth:
            last = self.segments[-1]
            above = self.segments[-2].depth if len(self.segments) > 1 else depth
            stop = min([depth, above, *(layer for layer in self._watched if layer > last.depth)])
            tokens = self.pending[last.first : last.first + last.hidden.shape[1]]
            paths = self.paths[last.first : last.first + len(tokens)]
            tree = None if is_chain(paths, last.first) else TreeRows(self.length, tuple(paths))
            position = self._position(last.first)
            last.hidden = yield Block(last.hidden, last.depth, stop, position, self.cache, tree, tokens)
            last.depth = stop
            if stop in self._watched:
                self._watched[stop].append(last.hidden[0])
            self._merge()

    def _position(self, node: int) -> int:
        """Position of a pending token in the text."""
        return self.length + len(self.paths[node]) - 1 + self.position_offset

    def _embed(self) -> None:
        """Hidden states at depth 0 of the tokens that have none, in one block."""
        first = len(self.pending) - self._fresh
        device = self.layers.device  # a tensor made of a list would be copied there, and wait for what runs there
        fresh = [torch.full((1, 1), token, device=device) for token in self.pending[first:]]
        paths = self.paths[first:]
        tree = None if is_chain(paths, first) else TreeRows(self.length, tuple(paths))
        hidden = self.layers.embed(torch.cat(fresh, dim=1), self._position(first), tree)
        self._embedded.append(hidden[0])
        self.segments.append(Segment(hidden, 0, first))
        self._fresh = 0

    def _merge(self) -> None:
        """Join the last two segments where they have come to the same depth."""
        if len(self.segments) > 1 and self.segments[-2].depth == self.segments[-1].depth:
            last = self.segments.pop()
            self.segments[-1].hidden = torch.cat([self.segments[-1].hidden, last.hidden], dim=1)

    def verify(self) -> Tensor:
        """Bring all pending tokens to the top; target logits of each of them, shape [1, T, V]."""
        return verify_all([self])[0]

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int]) -> None:
        """Settle tokens whose successors are known, as one block: no logits are asked for. Nothing is pending."""
        for token in token_ids:
            self.push(token)
        advance_all([self], self.layers.num_layers)
        self._top = self.layers.norm(self.top())
        self.settle(range(len(token_ids)))

    def top(self) -> Tensor:
        """Hidden states [1, T, D] of all pending tokens, which are at the top."""
        assert len(self.segments) == 1
        return self.segments[0].hidden

    def settle(self, nodes: Sequence[int]) -> None:
        """Settle pending tokens, keep their cache rows in every layer and drop all others; nothing is pending.

        Args:
            nodes: the first places of a path, in its order.
        """
        self.layers.keep(self.cache, self.length, nodes)
        if self._watched:
            self._keep_states(nodes)
        if self._top is not None and nodes:
            self.deep = self._top[0, nodes[-1]]
        self._top = None
        self._embedded.clear()
        self.lookup.extend([self.pending[node] for node in nodes])
        self.length += len(nodes)
        self.pending.clear()
        self.paths.clear()
        self._fresh = 0
        self.segments.clear()

    def _keep_states(self, nodes: Sequence[int]) -> None:
        """Keep for heads what the base knew at positions that are settled now."""
        if nodes and self._top is not None and self.deep is not None:
            deep = torch.cat([self.deep[None], self._top[0, list(nodes[:-1])]])
            for layer in self._watched:
                states = SettledStates(self.at_exit(layer, nodes), self.embeddings(nodes), deep)
                self.unread.setdefault(layer, deque(maxlen=WINDOW)).append(states)
        for parts in self._watched.values():
            parts.clear()
        for memory in self.memories.values():
            memory.forget()


@torch.inference_mode()
def advance_all(states: Sequence[DecodeState], depth: int) -> None:
    """As `DecodeState.advance`, for several requests on one base; blocks between the same two depths run together."""
    steps = [state.blocks(depth) for state in states]
    asked = [(one, next(one, None)) for one in steps]
    while waiting := [(one, block) for one, block in asked if block is not None]:
        way = min((block.start, block.stop) for _, block in waiting)
        group = [(one, block) for one, block in waiting if (block.start, block.stop) == way]
        outputs = states[0].layers.run_all([block for _, block in group])
        asked = [(one, block) for one, block in waiting if (block.start, block.stop) != way]
        asked += [(one, _after(one, output)) for (one, _), output in zip(group, outputs, strict=True)]


def _after(steps: Generator[Block, Tensor, None], output: Tensor) -> Block | None:
    """The next block once one has run; None at the end."""
    try:
        return steps.send(output)
    except StopIteration:
        return None


@torch.inference_mode()
def verify_all(states: Sequence[DecodeState]) -> list[Tensor]:
    """As `DecodeState.verify`, for several requests on one base."""
    layers = states[0].layers
    advance_all(states, layers.num_layers)
    normed, logits = layers.tops([state.top() for state in states])
    for state, one in zip(states, normed, strict=True):
        state._top = one
    return logits


def _rows(blocks: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Rows [N, D] of blocks one after the other; a view where they lie side by side."""
    hidden = blocks[0] if len(blocks) == 1 else torch.cat(tuple(blocks))
    first, last = rows[0], rows[-1]
    if list(rows) == list(range(first, last + 1)):
        return hidden[first : last + 1]
    return hidden[list(rows)]
