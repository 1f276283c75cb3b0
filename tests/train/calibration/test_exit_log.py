"""`ExitLog`: what heads draft as a round's first draft, second draft and so on."""

import pytest
import torch

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from train.calibration.exit_log import by_age
from train.features.extractor import FeatureExtractor

ROWS = [(list(range(3, 9)), list(range(20, 32))), ([5, 4], [40, 41, 42])]


@pytest.mark.parametrize("kind", ["attention", "deep", "linear"])
def test_logits_of_all_drafts_are_those_of_each(make_model, kind):
    model = make_model()
    layers, vocab_size = DecoderLayers(model), model.config.vocab_size
    exits = ExitHeads(kind, [2, 4], hidden_size=model.config.hidden_size, draft_vocab_size=vocab_size, rank=4)
    heads = DraftHeads.of(exits, layers, torch.arange(vocab_size))
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    features = FeatureExtractor(layers, [2, 4], top_k=1, prompt_tokens=4 if exits.one.attends else 0)(ROWS)
    ages = exits.one.ages
    found = by_age(heads, features, ages)
    assert len(found) == len(ages)
    for age, logits in zip(ages, found, strict=True):
        alone = heads(features.hidden, features.context(age))
        assert all(torch.allclose(logits[layer], alone[layer], atol=1e-5) for layer in (2, 4))
    if kind == "attention":  # drafts behind the fourth are worth less than it, and rounds may be long
        assert ages == (1, 2, 3, 4, 6) and not torch.allclose(found[3][2], found[4][2], atol=1e-3)
