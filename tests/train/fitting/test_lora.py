"""LoRA heads: fitted as PEFT's, exported to a head without PEFT that gives the same logits."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.heads import DraftUnembedding, ExitHeads, LoraHead
from train.fitting.lora import use_peft, without_peft

HIDDEN, DRAFT, RANK = 32, 64, 4


def new_heads() -> ExitHeads:
    return ExitHeads("lora", [2, 4], hidden_size=HIDDEN, draft_vocab_size=DRAFT, rank=RANK)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def unembedding(request, make_model):
    return DraftUnembedding(DecoderLayers(make_model().to(request.param)), torch.arange(0, 128, 2))


def twins(unembedding) -> ExitHeads:
    heads = new_heads()
    use_peft(heads, unembedding, rank=RANK)
    return heads


def inputs(unembedding):
    hidden = {layer: torch.randn(5, HIDDEN).to(unembedding.weight.dtype) for layer in (2, 4)}
    return hidden, hidden[2], unembedding


@torch.no_grad()
def test_exported_heads_give_the_logits_of_peft(unembedding):
    torch.manual_seed(0)
    heads = twins(unembedding)
    assert sum(isinstance(module, LoraLayer) for module in heads.modules()) == 2
    for parameter in heads.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    given = inputs(unembedding)
    fitted = heads(*given)
    plain = {layer: unembedding(hidden) for layer, hidden in given[0].items()}
    exported = without_peft(heads)
    assert all(isinstance(head, LoraHead) for head in exported.heads.values())
    assert exported.state_dict().keys() == new_heads().state_dict().keys()
    tolerance = 1e-5 if unembedding.weight.dtype == torch.float32 else 2**-7  # PEFT's logits are rounded to bf16
    for layer, logits in exported(*given).items():
        torch.testing.assert_close(logits, fitted[layer].float(), rtol=tolerance, atol=tolerance)
        assert (logits - plain[layer].float()).abs().max() > 1


def test_only_lora_is_fitted_and_saved(unembedding):
    heads = twins(unembedding)
    learned = {name for name, parameter in heads.named_parameters() if parameter.requires_grad}
    assert learned == heads.state_dict().keys()
    assert {parameter.dtype for parameter in heads.parameters() if parameter.requires_grad} == {torch.float32}
    assert sum(tensor.numel() for tensor in heads.state_dict().values()) == 2 * RANK * (HIDDEN + DRAFT)
    rows = unembedding.weight.clone()
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    optimizer = torch.optim.AdamW([parameter for parameter in heads.parameters() if parameter.requires_grad])
    for logits in heads(*inputs(unembedding)).values():
        logits.float().logsumexp(-1).sum().backward()
    optimizer.step()
    assert torch.equal(unembedding.weight, rows)
    assert all(not torch.equal(heads.state_dict()[name], tensor) for name, tensor in before.items() if "_B" in name)
    heads.load_state_dict(before, strict=True)
    assert all(torch.equal(heads.state_dict()[name], tensor) for name, tensor in before.items())


def test_new_lora_heads_are_the_logit_lens(unembedding):
    given = inputs(unembedding)
    for layer, logits in twins(unembedding)(*given).items():
        assert torch.equal(logits, unembedding(given[0][layer]))


def test_other_heads_stay(unembedding):
    heads = ExitHeads("residual", [2], hidden_size=HIDDEN, draft_vocab_size=DRAFT, rank=RANK)
    before = heads.heads["2"]
    use_peft(heads, unembedding, rank=RANK)
    assert without_peft(heads).heads["2"] is before


def test_scaled_logits_are_scaled_the_same(unembedding):
    unembedding.scaling = 4.0
    heads = twins(unembedding)
    given = inputs(unembedding)
    twin = heads(*given)[2].detach().float()
    assert torch.equal(twin, unembedding(given[0][2]).float())
    torch.testing.assert_close(without_peft(heads)(*given)[2].detach().float(), twin)
