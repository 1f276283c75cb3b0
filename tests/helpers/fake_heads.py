"""Drafters without trained heads, for tests of the loop."""

import torch

from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState


class FakeHeads:
    """Drafts without a head: `random`, `right` (knows the truth), `wrong`, `constant` or `mixed`, always sure."""

    def __init__(
        self, kind: str, exit_layers: list[int], truth: list[int] | None = None, vocabulary: int = 96
    ) -> None:
        self.kind = kind
        self.modules = ()
        self.exit_layers = exit_layers
        self.truth = truth or []
        self.vocabulary = vocabulary
        self.numbers = torch.Generator().manual_seed(0)

    def propose(self, layer: int, state: DecodeState) -> tuple[int, float]:
        """What the kind says."""
        draw = int(torch.randint(self.vocabulary, (1,), generator=self.numbers))
        confidence = float(torch.rand(1, generator=self.numbers)) if self.kind == "mixed" else 1.0
        correct = self.truth[state.length] if state.length < len(self.truth) else 0
        wrong = (correct + 1) % self.vocabulary
        mixed = correct if draw % 3 else wrong
        return {"random": draw, "right": correct, "wrong": wrong, "constant": 5, "mixed": mixed}[self.kind], confidence

    def on(self, layers: DecoderLayers) -> "FakeHeads":
        """Nothing to move."""
        return self
