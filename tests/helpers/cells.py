"""Every way of decoding a family: greedy and sampled, chains, trees and several requests, of one tiny model."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime import SpeculationBounds, detach
from runtime.batch import Batch, generated
from runtime.drafting import policy
from runtime.generate import attach
from runtime.handle import SpecBound
from runtime.stats import SpeculationStats
from tests.helpers.fake_heads import Adversary
from tests.helpers.families import VOCABULARY, prompt

NEW = 60
# A random model may say one word over and over, left to itself: a text that compares next to nothing.
_WANDERING: dict[str, Any] = {"no_repeat_ngram_size": 2, "max_new_tokens": NEW}
GREEDY: dict[str, Any] = {"do_sample": False, **_WANDERING}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, **_WANDERING}
CHAINS, TREES = SpeculationBounds(0.2, 1, 5), SpeculationBounds(0.2, 1, 8, max_branches=3, max_depth=4)
# What `generate` is given, and how it goes on.
Calls = Sequence[tuple[dict[str, Tensor], dict[str, Any]]]


def alone(model: PreTrainedModel, calls: Calls) -> tuple[list[list[int]], list[SpeculationStats]]:
    """Texts of `generate`, one call after the other, the seed that of its place; and what speculation did."""
    texts, stats = [], []
    for seed, (given, options) in enumerate(calls):
        torch.manual_seed(seed)
        texts.append(model.generate(**given, **options)[0].tolist())
        if hasattr(model, "specbound"):
            stats.append(model.specbound.stats)
    return texts, stats


def together(model: PreTrainedModel, calls: Calls) -> tuple[list[list[int]], list[SpeculationStats]]:
    """As `alone`, in one batch; they begin one round after the other."""
    with Batch(model, len(calls)) as batch:
        begun = []
        for seed, (given, options) in enumerate(calls):
            begun.append(batch.add(seed=seed, **given, **options))
            batch.round()
        while not all(call.ended for call in begun):
            batch.round()
    texts = [given["input_ids"][0].tolist() + generated(call) for (given, _), call in zip(calls, begun, strict=True)]
    return texts, [call.stats for call in begun if call.stats is not None]


def check(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int | dict[str, Tensor], dict[str, Any]]],
    patch: pytest.MonkeyPatch,
) -> None:
    """Ids of stock's `generate`, whatever is drafted, by chains and by trees.

    In float32 the trees are those of several requests together, in other dtypes the chains are.

    Args:
        prompts: tokens of each, or what else it is; and how it goes on.
    """
    patch.setattr(policy, "MAX_ROWS", 64)  # all requests draft, however many there are
    calls = [
        (given if isinstance(given, dict) else {"input_ids": prompt(given)}, options) for given, options in prompts
    ]
    expected, _ = alone(model, calls)
    assert all(len(set(text[-NEW:])) > 9 for text in expected)
    several = TREES if model.dtype == torch.float32 else CHAINS
    attach(model, SpecBound(model, Adversary(expected, VOCABULARY), CHAINS))
    for bounds in (CHAINS, TREES):
        model.specbound.bounds = bounds
        found, stats = together(model, calls) if bounds is several else alone(model, calls)
        assert found == expected, (bounds, [one == other for one, other in zip(found, expected, strict=True)])
        assert model.specbound.certificate.bitwise and len(stats) == len(calls)
        assert all(one.drafted.total() > one.accepted.total() > 5 for one in stats)
    detach(model)
