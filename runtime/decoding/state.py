"""`DecodeState`: one request's cache and the tokens whose successor is not settled.

Those pending tokens stand at different depths. Along them depth never rises, so the ones that lack a layer are
always the last ones: a stack of segments, deepest first, each a block of consecutive tokens at one depth.
Layers run in inference mode, which every call of a small operation feels; what was emitted leaves it as a copy.
Knows nothing of heads, confidence or policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.decoding.cache import KVCache
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.lookup import ContextLookup


@dataclass(slots=True)
class Segment:
    """Consecutive pending tokens at one depth: hidden states [1, T, D], `position` of the first."""

    hidden: Tensor
    depth: int
    position: int


class DecodeState:
    """Cache and pending tokens of one request.

    Args:
        layers: the base.
        token_ids: the settled tokens as far as they are known, for the lookup.
        cache: holds the same number of rows in every layer, those of the settled tokens.
        deep: the base's normed top state at the last settled token, shape [D]; None where it is not known.
        position_offset: position of the first token; not 0 where the caller numbers positions another way.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        cache: KVCache,
        token_ids: Sequence[int],
        *,
        deep: Tensor | None = None,
        position_offset: int = 0,
    ) -> None:
        self.layers = layers
        self.cache = cache
        self.length = cache.get_seq_length()
        self.position_offset = position_offset
        self.segments: list[Segment] = []
        self.pending: list[int] = []
        self._fresh = 0  # the last of them, whose hidden states no layer has asked for
        self.lookup = ContextLookup(token_ids)
        self.embedding: Tensor | None = None
        self.deep = deep
        self._top: Tensor | None = None

    def push(self, token: int) -> None:
        """Make a token the newest pending one, at depth 0."""
        self.pending.append(token)
        self.length += 1
        self._fresh += 1

    @property
    def newest(self) -> Tensor:
        """Hidden state of the newest pending token, shape [1, 1, D], at the depth reached so far."""
        return self.segments[-1].hidden[:, -1:]

    @torch.inference_mode()
    def advance(self, depth: int) -> None:
        """Bring every pending token to at least `depth`; each layer runs once, over all tokens that lack it."""
        if self._fresh and depth > 0:
            self._embed()
        while self.segments and self.segments[-1].depth < depth:
            last = self.segments[-1]
            above = self.segments[-2].depth if len(self.segments) > 1 else depth
            stop = min(depth, above)
            last.hidden = self.layers.run(last.hidden, last.depth, stop, last.position, self.cache)
            last.depth = stop
            self._merge()

    def _embed(self) -> None:
        """Hidden states at depth 0 of the tokens that have none, in one block."""
        position = self.length - self._fresh + self.position_offset
        device = self.layers.device  # a tensor made of a list would be copied there, and wait for what runs there
        fresh = [torch.full((1, 1), token, device=device) for token in self.pending[-self._fresh :]]
        hidden = self.layers.embed(torch.cat(fresh, dim=1), position)
        self.embedding = hidden[:, -1:]
        self.segments.append(Segment(hidden, 0, position))
        self._fresh = 0

    def _merge(self) -> None:
        """Join the last two segments where they have come to the same depth."""
        if len(self.segments) > 1 and self.segments[-2].depth == self.segments[-1].depth:
            last = self.segments.pop()
            self.segments[-1].hidden = torch.cat([self.segments[-1].hidden, last.hidden], dim=1)

    @torch.inference_mode()
    def verify(self) -> Tensor:
        """Bring all pending tokens to the top; target logits of each of them, shape [1, T, V]."""
        self.advance(self.layers.num_layers)
        assert len(self.segments) == 1
        self._top = self.layers.norm(self.segments[0].hidden)
        return self.layers.unembed(self._top)

    def crop(self, length: int) -> None:
        """Settle the first `length` tokens, keep their cache rows in every layer; nothing is pending."""
        self.cache.crop(length)
        settled = length - (self.length - len(self.pending))
        if self._top is not None and settled > 0:
            self.deep = self._top[0, settled - 1]
        self._top = None
        self.lookup.extend(self.pending[:settled])
        self.pending.clear()
        self._fresh = 0
        self.segments.clear()
        self.length = length
