"""LoRA heads: fitted as PEFT's, exported to a head without PEFT that gives the same logits."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads, LoraHead
from train.fitting.lora import use_peft, without_peft

HIDDEN, DRAFT, RANK = 32, 64, 4


def new_heads(kind: str = "lora") -> ExitHeads:
    return ExitHeads(kind, [2, 4], hidden_size=HIDDEN, draft_vocab_size=DRAFT, rank=RANK)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def twins(request, make_model) -> DraftHeads:
    layers = DecoderLayers(make_model().to(request.param))
    return use_peft(DraftHeads.of(new_heads(), layers, torch.arange(0, 128, 2)))


def inputs(heads: DraftHeads):
    hidden = {layer: torch.randn(5, HIDDEN).to(heads.unembedding.weight.dtype) for layer in (2, 4)}
    return hidden, None


@torch.no_grad()
def test_exported_heads_give_the_logits_of_peft(twins):
    torch.manual_seed(0)
    assert sum(isinstance(module, LoraLayer) for module in twins.exits.modules()) == 2
    for parameter in twins.exits.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    given = inputs(twins)
    fitted = twins(*given)
    plain = {layer: twins.unembedding(hidden) for layer, hidden in given[0].items()}
    exported = without_peft(twins)
    assert all(type(head) is LoraHead for head in exported.exits)
    assert exported.exits.state_dict().keys() == new_heads().state_dict().keys()
    tolerance = 1e-5 if twins.unembedding.weight.dtype == torch.float32 else 2**-7  # PEFT's logits are rounded to bf16
    for layer, logits in exported(*given).items():
        torch.testing.assert_close(logits, fitted[layer].float(), rtol=tolerance, atol=tolerance)
        assert (logits - plain[layer].float()).abs().max() > 1


def test_only_lora_is_fitted_and_saved(twins):
    heads, unembedding = twins.exits, twins.unembedding
    learned = {name for name, parameter in heads.named_parameters() if parameter.requires_grad}
    assert learned == heads.state_dict().keys()
    assert {parameter.dtype for parameter in heads.parameters() if parameter.requires_grad} == {torch.float32}
    assert sum(tensor.numel() for tensor in heads.state_dict().values()) == 2 * RANK * (HIDDEN + DRAFT)
    rows = unembedding.weight.clone()
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    optimizer = torch.optim.AdamW([parameter for parameter in heads.parameters() if parameter.requires_grad])
    for logits in twins(*inputs(twins)).values():
        logits.float().logsumexp(-1).sum().backward()
    optimizer.step()
    assert torch.equal(unembedding.weight, rows)
    assert all(not torch.equal(heads.state_dict()[name], tensor) for name, tensor in before.items() if "_B" in name)
    heads.load_state_dict(before, strict=True)
    assert all(torch.equal(heads.state_dict()[name], tensor) for name, tensor in before.items())


def test_new_lora_heads_are_the_logit_lens(twins):
    given = inputs(twins)
    for layer, logits in twins(*given).items():
        assert torch.equal(logits, twins.unembedding(given[0][layer]))


def test_a_twin_costs_what_its_head_does(twins):
    costs = [
        (head.weights_read, head.fit_flops, head.kept_numbers, head.ages) for head in (*twins.exits, new_heads().one)
    ]
    assert len(set(costs)) == 1


def test_other_heads_stay(twins):
    heads = twins.with_exits(new_heads("deep"))
    before = list(heads.exits)
    assert list(without_peft(use_peft(heads)).exits) == before


def test_scaled_logits_are_scaled_the_same(twins):
    twins.unembedding.scaling = 4.0
    given = inputs(twins)
    twin = twins(*given)[2].detach().float()
    assert torch.equal(twin, twins.unembedding(given[0][2]).float())
    torch.testing.assert_close(without_peft(twins)(*given)[2].detach().float(), twin)
