"""`CostTable`: what is counted from weights where nothing was measured."""

import pytest
import torch

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.exact.execution import mixtures
from tests.helpers.families import VOCABULARY, tiny
from train.features.weights import idle_parameters
from train.replay.contention import Contention
from train.replay.costs import COUNTED_EXTRA_ROW, CostTable, counted_costs


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


def test_costs_of_a_busy_machine_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other work had the core for a tenth of the time or more."""
    costs, clocks = CostTable.counted(6, head=1.0, unembedding=1.0), {"perf_counter": 10.0, "thread_time": 3.0}
    for name in clocks:
        monkeypatch.setattr(f"train.replay.contention.time.{name}", lambda name=name: clocks[name])
    contention = Contention()
    clocks |= {"perf_counter": 110.0, "thread_time": 98.0}
    assert contention.told(costs) == costs
    clocks["thread_time"] = 63.0
    assert "the cores 40% of the time" in contention.told(costs).conditions["busy"]
