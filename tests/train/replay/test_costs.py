"""`CostTable`: what is counted from weights where nothing was measured."""

import pytest
import torch

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.exact.execution import mixtures
from tests.helpers.families import VOCABULARY, tiny
from train.features.weights import idle_parameters
from train.replay.costs import COUNTED_EXTRA_ROW, counted_costs


@pytest.mark.parametrize("family", ["mixtral", "dots1", "llama"])
def test_counted_rows_of_a_mixture_wake_experts_each(family: str) -> None:
    """What a block costs: weights outside the mixtures are read once for all rows, the others for each row."""
    model = tiny(family)
    exits = ExitHeads("deep", [1], hidden_size=48, draft_vocab_size=VOCABULARY, rank=8)
    costs = counted_costs(model, DraftHeads.of(exits, DecoderLayers(model), torch.arange(VOCABULARY)))
    held = sum(each.numel() for mixture in mixtures(model) for each in mixture.parameters())
    layers = sum(each.numel() for each in model.model.layers.parameters()) + model.model.norm.weight.numel()
    mixed, read = held - idle_parameters(model), layers - idle_parameters(model)
    assert costs.layer[1] == 1.0 and bool(mixed) == (family != "llama")
    for rows in (2, 5, 16):
        once = 1.0 + COUNTED_EXTRA_ROW * (rows - 1)
        assert costs.layer[rows] == pytest.approx(((read - mixed) * once + mixed * rows) / read)
