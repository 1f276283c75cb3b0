"""Texts of like lengths run together: least padding for the forwards, and the features of each text as before."""

import random

import pytest
import torch

from runtime.decoding.layers import DecoderLayers
from train.features.extractor import FeatureExtractor
from train.features.lengths import alike


def cost(lengths, groups, forward) -> int:
    return sum(forward + len(group) * max(lengths[index] for index in group) for group in groups)


def every(order):
    """All ways to cut a list into pieces."""
    if not order:
        yield []
    for end in range(1, len(order) + 1):
        for rest in every(order[end:]):
            yield [order[:end], *rest]


@pytest.mark.parametrize("seed", range(5))
def test_groups_cost_least(seed):
    numbers = random.Random(seed)
    lengths = [numbers.randrange(5, 800) for _ in range(9)]
    for forward in (0, 50, 300, 10_000):
        groups = alike(lengths, forward=forward)
        assert sorted(index for group in groups for index in group) == list(range(9))
        order = sorted(range(9), key=lambda index: lengths[index])
        assert cost(lengths, groups, forward) == min(cost(lengths, each, forward) for each in every(order))
    assert len(groups) == 1 and alike([]) == [] and alike([7]) == [[0]]


def test_each_text_has_the_features_it_has_alone(make_model, monkeypatch):
    """In their order, with prompts; far fewer positions go through the base than padded to the longest."""
    extract = FeatureExtractor(DecoderLayers(make_model()), (2, 4), top_k=5, prompt_tokens=3)
    rows = [
        ([3] * prompt, [5 + prompt % 100] * answer)
        for prompt, answer in ((4, 200), (3, 6), (200, 100), (9, 2), (2, 250))
    ]
    seen, run = [], extract._run
    monkeypatch.setattr(extract, "_run", lambda ids, mask, chosen: seen.append(ids.numel()) or run(ids, mask, chosen))
    found = extract(rows)
    assert sum(seen) < 0.65 * len(rows) * 300 and len(seen) > 1
    assert found.lengths == [200, 6, 100, 2, 250]
    for part, row in zip(found.split(), rows, strict=True):
        alone = extract([row])
        torch.testing.assert_close(part.hidden[4], alone.hidden[4], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part.prompts.hidden[2], alone.prompts.hidden[2], rtol=1e-4, atol=1e-4)
        assert torch.equal(part.target, alone.target) and torch.equal(part.top_ids[:, 0], alone.top_ids[:, 0])


def test_a_base_that_is_spread_runs_once_for_all(make_model, monkeypatch):
    monkeypatch.setattr("train.features.extractor.is_spread", lambda model: True)
    extract, seen = FeatureExtractor(DecoderLayers(make_model()), (2,), top_k=5), []
    run = extract._run
    monkeypatch.setattr(extract, "_run", lambda ids, mask, chosen: seen.append(len(ids)) or run(ids, mask, chosen))
    extract([([3], [4] * 300), ([3], [4]), ([3], [4])])
    assert seen == [3]
