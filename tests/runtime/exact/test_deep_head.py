"""Heads in our own kernel: the drafts and confidences of the modules, up to rounding."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import MAX_AGE, ExitHeads, HeadContext
from runtime.exact.native.deep_head import native_heads
from runtime.exact.native.library import why_not_native
from tests.helpers.families import tiny

SIZE, VOCABULARY = 48, 37


def made(
    kind: str = "deep", *, dtype: torch.dtype = torch.bfloat16, rank: int = 32, family: str = "llama"
) -> DraftHeads:
    """Random heads on a tiny base, in our kernel where it takes them."""
    if why_not_native() is not None:
        pytest.skip(f"no native kernels here: {why_not_native()}")
    base = tiny(family, dtype=dtype)
    exits = ExitHeads(kind, [1, 2], hidden_size=SIZE, draft_vocab_size=VOCABULARY, rank=rank)
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    heads = DraftHeads.of(exits.to(dtype).eval(), DecoderLayers(base), torch.arange(3, 3 + VOCABULARY))
    return native_heads(heads)


@torch.inference_mode()
def test_drafts_are_those_of_the_modules() -> None:
    """At every age; a confidence is off by no more than rounding, and another temperature gives another one."""
    heads = made()
    modules = replace(heads, native={})
    same = 0
    for number in range(100):
        state, embedding, deep = torch.randn(3, 1, SIZE).bfloat16()
        context = HeadContext(embedding, deep, torch.tensor([number % (MAX_AGE + 1)]))
        layer, temperature = 1 + number % 2, 1.0 + number / 100
        token, chance = heads.best(layer, state, context, temperature, 1)[0][0]
        expected, sure = modules.best(layer, state, context, temperature, 1)[0][0]
        same += token == expected
        assert chance == pytest.approx(sure, rel=0.1) and 3 <= token < 3 + VOCABULARY
        assert heads.best(layer, state, context, 9.0, 1)[0][0][1] < chance
    assert same > 90


@torch.inference_mode()
def test_several_rows_are_each_what_they_are_alone() -> None:
    """And of each the likeliest drafts, in order, none twice."""
    heads = made()
    states, embeddings, deeps = torch.randn(3, 11, SIZE).bfloat16()
    ages = torch.arange(11) % (MAX_AGE + 1)
    together = heads.best(1, states, HeadContext(embeddings, deeps, ages), 1.2, 4)
    for row, drafts in enumerate(together):
        part = slice(row, row + 1)
        alone = heads.best(1, states[part], HeadContext(embeddings[part], deeps[part], ages[part]), 1.2, 4)
        assert drafts == alone[0] and len({token for token, _ in drafts}) == 4
        assert [chance for _, chance in drafts] == sorted((chance for _, chance in drafts), reverse=True)
        assert sum(chance for _, chance in drafts) <= 1.001


@torch.inference_mode()
def test_logits_that_are_no_numbers_draft_nothing() -> None:
    """Their confidence passes no threshold."""
    state = torch.full((1, SIZE), torch.nan).bfloat16()
    [[(_, chance), _]] = made().best(1, state, HeadContext(state, state, torch.tensor([1])), 1.0, 2)
    assert not chance >= 0.0


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda heads: pickle.loads(pickle.dumps(heads))], ids=["copy", "pickle"]
)
@torch.inference_mode()
def test_copies_draft_from_weights_of_their_own(copied: Any) -> None:
    """What is written in the original does not move a copy; other heads in their place do not run in the kernel."""
    heads = made()
    state, embedding, deep = torch.randn(3, 1, SIZE).bfloat16()
    context = HeadContext(embedding, deep, torch.tensor([1]))
    expected, other = heads.best(1, state, context, 1.0, 2), copied(heads)
    for packed in heads.native[1].held:
        packed.zero_()
    assert other.best(1, state, context, 1.0, 2) == expected != heads.best(1, state, context, 1.0, 2)
    assert other.with_exits(heads.exits).native == {}


WRONG: list[dict[str, Any]] = [{"kind": "lora"}, {"dtype": torch.float32}, {"rank": 20}, {"family": "gemma"}]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_other_heads_stay_modules(options: dict[str, Any]) -> None:
    """Another kind, dtype or rank, or a final norm that is not Llama's."""
    assert made(**options).native == {}
