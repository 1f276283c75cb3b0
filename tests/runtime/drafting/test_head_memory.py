"""An attention head at work: what it drafts in rounds is what it would have drafted on the finished text."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from runtime import SpeculationBounds
from runtime.decoding.drafter import HeadDrafter
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.drafting import head_memory
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.drafting.temperature import TemperatureSchedule
from runtime.generate import attach
from runtime.handle import SpecBound
from train.features.extractor import FeatureExtractor

EXITS, NEW, PROMPT = [2, 4], 40, torch.arange(3, 12)[None]


def drafting(model: Any) -> HeadDrafter:
    """Large random attention heads."""
    torch.manual_seed(1)
    exits = ExitHeads("attention", EXITS, hidden_size=32, draft_vocab_size=128, rank=16)
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    heads = DraftHeads.of(exits.requires_grad_(False).eval(), DecoderLayers(model), torch.arange(128))
    return HeadDrafter(heads, TemperatureSchedule.none(EXITS))


class Coached:
    """Asks the heads, keeps what they said, and proposes the text's own next token beside another one."""

    modules = ()

    def __init__(self, inner: HeadDrafter, truth: list[int]) -> None:
        self.inner, self.truth, self.exit_layers, self.watched = inner, truth, EXITS, inner.watched
        self.said: dict[tuple[int, int, int], list[tuple[int, float]]] = {}

    def on(self, layers: DecoderLayers) -> "Coached":
        """Nothing to move."""
        return self

    def propose(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> Any:
        """Layer 2 is not sure of every third position, so that layer 4 is asked there too."""
        proposed = []
        for node, own in zip(nodes, self.inner.propose(layer, state, nodes, 3), strict=True):
            distance = len(state.paths[node])
            position = state.length + distance
            right = state.tokens(node) == self.truth[state.length : position]
            if right:
                self.said[layer, position, distance] = own
            token = self.truth[position] if position < len(self.truth) else 0
            sure = 0.1 if layer == 2 and position % 3 == 0 else 0.9
            proposed.append([((token + 1) % 128, sure), (token, sure)])
        return proposed


@pytest.mark.parametrize("branches", [1, 2])
def test_drafts_are_those_of_the_finished_text(make_model: Any, branches: int) -> None:
    """Of both exits, as first and as later drafts, in chains that go wrong at once and in trees."""
    model = make_model()
    stock = model.generate(PROMPT, max_new_tokens=NEW, do_sample=False)[0].tolist()
    heads = drafting(model)
    coached = Coached(heads, stock)
    attach(model, SpecBound(model, coached, SpeculationBounds(0.5, 4, 8, max_branches=branches, max_depth=3)))
    assert model.generate(PROMPT, max_new_tokens=NEW, do_sample=False)[0].tolist() == stock
    layers = model.specbound.prepared.layers
    split = PROMPT.shape[1]
    features = FeatureExtractor(layers, EXITS, top_k=1, prompt_tokens=256)([(stock[:split], stock[split:])])
    with torch.no_grad():
        logits = [heads.heads(features.hidden, features.context(age)) for age in (1, 2, 3)]
    assert {distance for _, _, distance in coached.said} == ({1} if branches == 1 else {1, 2, 3})
    assert len(coached.said) > NEW // 3
    for (layer, position, distance), said in coached.said.items():
        expected = torch.softmax(logits[distance - 1][layer][position - split], -1)
        assert said[0][0] == int(expected.argmax()), (layer, position, distance)
        assert said[0][1] == pytest.approx(float(expected.max()), abs=1e-3)


def test_long_texts_are_forgotten_in_part(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept stays bounded, and ids stock's."""
    monkeypatch.setattr(head_memory, "WINDOW", 8)
    model = make_model()
    stock = model.generate(PROMPT, max_new_tokens=NEW, do_sample=False)[0].tolist()
    kept = []
    reading = head_memory.HeadMemory.reading

    def watched(self: Any, *args: Any) -> Any:
        found = reading(self, *args)
        kept.append(self._settled)
        return found

    monkeypatch.setattr(head_memory.HeadMemory, "reading", watched)
    attach(model, SpecBound(model, drafting(model), SpeculationBounds(0.0, 4, 3)))
    assert model.generate(PROMPT, max_new_tokens=NEW, do_sample=False)[0].tolist() == stock
    assert 8 <= max(kept) <= 16
