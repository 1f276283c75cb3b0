"""Drafters without trained heads, for tests of the loop."""

from collections.abc import Sequence

import torch

from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.drafting.lookup import MAX_MATCH


class FakeHeads:
    """Drafts without a head: `random`, `right` (knows the truth), `wrong`, `constant` or `mixed`, always sure."""

    def __init__(
        self, kind: str, exit_layers: list[int], truth: list[int] | None = None, vocabulary: int = 96
    ) -> None:
        self.kind = kind
        self.modules, self.watched = (), []
        self.exit_layers = exit_layers
        self.truth = truth or []
        self.vocabulary = vocabulary
        self.numbers = torch.Generator().manual_seed(0)

    def propose(
        self, layer: int, state: DecodeState, nodes: Sequence[int], count: int
    ) -> list[list[tuple[int, float]]]:
        """What the kind says, for each node; further tokens are other ones, each less sure."""
        return [self._of(state.length + len(state.paths[node]), count) for node in nodes]

    def _of(self, position: int, count: int) -> list[tuple[int, float]]:
        draw = int(torch.randint(self.vocabulary, (1,), generator=self.numbers))
        confidence = float(torch.rand(1, generator=self.numbers)) if self.kind == "mixed" else 1.0
        correct = self.truth[position] if position < len(self.truth) else 0
        wrong = (correct + 1) % self.vocabulary
        mixed = correct if draw % 3 else wrong
        first = {"random": draw, "right": correct, "wrong": wrong, "constant": 5, "mixed": mixed}[self.kind]
        step = 1 if self.kind != "wrong" else 2
        return [((first + step * index) % self.vocabulary, confidence / (1 + index)) for index in range(count)]

    def on(self, layers: DecoderLayers) -> "FakeHeads":
        """Nothing to move."""
        return self


class Adversary:
    """Drafts whatever may go wrong, at each of seven positions in its way, for requests whose texts it knows.

    At four of them it names the right token and others beside it; then wrong ones alone; then the right one last;
    then the right one twice.
    """

    modules, watched, exit_layers = (), (), (1,)

    def __init__(self, texts: Sequence[list[int]], vocabulary: int = 96) -> None:
        self.texts, self.vocabulary = texts, vocabulary

    def on(self, layers: DecoderLayers) -> "Adversary":
        """Nothing to move."""
        return self

    def propose(
        self, layer: int, state: DecodeState, nodes: Sequence[int], count: int
    ) -> list[list[tuple[int, float]]]:
        """By the text that goes on as this request's does."""
        tail = state.lookup._tail
        text = next((text for text in self.texts if tail == text[: state.length][-MAX_MATCH:]), [])
        return [self._of(text, state.length + len(state.paths[node]), count) for node in nodes]

    def _of(self, text: list[int], position: int, count: int) -> list[tuple[int, float]]:
        right = text[position] if position < len(text) else 0
        tokens = [(right + step) % self.vocabulary for step in range(count + 1)]
        kind = position % 7
        if kind == 4:
            tokens = tokens[1:]
        elif kind == 5:
            tokens = tokens[count - 1 :: -1]
        elif kind == 6:
            tokens = [right, *tokens]
        return [(token, 0.9 / (1 + 0.1 * place)) for place, token in enumerate(tokens[:count])]
