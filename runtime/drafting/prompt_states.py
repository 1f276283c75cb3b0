"""`PromptStates`: what a forward of the base left of a prompt, for heads that read of it. Knows no model."""

from typing import Any

import torch
from torch import Tensor

from runtime.drafting.exit_head import PROMPT_TOKENS, SettledStates


class PromptStates:
    """Hidden states that a forward left, by depth, those of its last positions; see `DecoderLayers.watching`."""

    def __init__(self) -> None:
        self.top: Tensor | None = None
        self._by_depth: dict[int, Tensor] = {}

    def see_top(self, state: Tensor) -> None:
        """Keep the last position's normed top state, shape [D]."""
        self.top = state

    def see(self, depth: int, output: Any) -> None:
        """Keep hidden states [1, T, D] at a depth, or a tuple that begins with them."""
        hidden = output[0] if isinstance(output, tuple) else output
        self._by_depth[depth] = hidden[0, -PROMPT_TOKENS - 1 :]

    def without(self, unlike: int) -> "PromptStates":
        """Those of all positions but so many at the end."""
        made = PromptStates()
        made._by_depth = {depth: states[: -unlike or None] for depth, states in self._by_depth.items()}
        return made

    def follow(self, earlier: "PromptStates") -> None:
        """Put what was left of the tokens before before these."""
        for depth, states in self._by_depth.items():
            self._by_depth[depth] = torch.cat([earlier._by_depth[depth], states])[-PROMPT_TOKENS - 1 :]

    @property
    def settled(self) -> dict[int, SettledStates]:
        """By exit layer: what its head reads of the prompt's last positions; empty where nothing was taken."""
        if not self._by_depth:
            return {}
        depths = sorted(self._by_depth)
        seen = min(map(len, self._by_depth.values()))  # layers that keep nothing may get the last position alone
        embedding, *exits, top = (self._by_depth[depth][-seen:] for depth in depths)
        deep = torch.cat([torch.zeros_like(top[:1]), top[:-1]])
        return {
            layer: SettledStates(hidden, embedding, deep, False)
            for layer, hidden in zip(depths[1:-1], exits, strict=True)
        }
