"""Heads on a base: the way between draft and target ids, rows that are borrowed, what a head reads and costs."""

from typing import Any

import pytest
import torch

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import HEAD_KINDS, ExitHeads, HeadContext
from runtime.errors import ConfigError


def on_base(make_model: Any, kind: str, ids: torch.Tensor) -> tuple[DraftHeads, DecoderLayers]:
    """New heads after layers 2 and 4 of a base."""
    layers = DecoderLayers(make_model())
    size = layers.config.hidden_size
    exits = ExitHeads(kind, [4, 2], hidden_size=size, draft_vocab_size=len(ids), rank=4)
    return DraftHeads.of(exits, layers, ids), layers


def test_the_inverse_leads_back_and_is_minus_one_elsewhere(make_model: Any) -> None:
    heads, _ = on_base(make_model, "deep", torch.tensor([2, 5, 11]))
    assert heads.target_to_draft[heads.draft_to_target].tolist() == [0, 1, 2]
    assert int((heads.target_to_draft == -1).sum()) == 125 and heads.target_to_draft.dtype == torch.int64


def test_rows_of_the_whole_vocabulary_are_the_base_s_own(make_model: Any) -> None:
    heads, layers = on_base(make_model, "deep", torch.arange(128))
    assert heads.unembedding.weight.data_ptr() == layers.unembedding.weight.data_ptr()
    assert heads.unembedding.rows not in list(heads.modules)
    heads, layers = on_base(make_model, "deep", torch.arange(128).flip(0))
    assert torch.equal(heads.unembedding.weight.flip(0), layers.unembedding.weight)
    assert heads.unembedding.rows in list(heads.modules)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_what_a_head_reads_and_costs(make_model: Any, kind: str) -> None:
    """Its ages are those that change its logits; numbers read are its own and the rows that its logits come from."""
    torch.manual_seed(0)
    heads, layers = on_base(make_model, kind, torch.arange(64))
    head, size = heads.exits.one, layers.config.hidden_size
    for parameter in heads.exits.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = dict.fromkeys([2, 4], torch.randn(1, size))
    states = torch.randn(1, size), torch.randn(1, size)
    logits = {heads(hidden, HeadContext(*states, torch.tensor([age])))[2].sum().item() for age in range(5)}
    assert len(logits) == (2 if head.attends else len(head.ages))  # without texts it knows a verified state or none
    assert head.num_weights == sum(tensor.numel() for tensor in heads.exits.heads["2"].state_dict().values())
    before = heads(hidden, HeadContext(*states, torch.tensor([0])))[2]
    heads.unembedding.rows.weight.data.mul_(2)
    assert torch.equal(before, heads(hidden, HeadContext(*states, torch.tensor([0])))[2]) != head.borrows_rows
    assert head.weights_read - head.num_weights == (64 * size if head.borrows_rows else 0)
    assert head.fit_flops > 2 * head.num_weights and head.kept_numbers >= size


def test_a_linear_head_starts_as_the_base_s_rows(make_model: Any) -> None:
    heads, _ = on_base(make_model, "linear", torch.arange(64))
    hidden = torch.randn(3, heads.unembedding.weight.shape[1])
    heads.exits.one.start(heads.unembedding)
    torch.testing.assert_close(heads.exits.heads["2"](hidden, None, heads.unembedding), heads.unembedding(hidden))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="head 'residual' is unknown: expected one of attention, deep, linear, lora"):
        ExitHeads("residual", [2], hidden_size=8, draft_vocab_size=8, rank=2)
