"""The distillation loss and expected acceptance, against a loop over single positions."""

import math

import pytest
import torch

from train.fitting.losses import IGNORED, Targets, distillation_loss, expected_acceptance

POSITIONS, DRAFT, VOCABULARY, TOP = 7, 5, 9, 4


@pytest.fixture
def case():
    """Draft logits, targets, and the map they were made with: ids 1 to 5 of 9 are in the draft vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(POSITIONS, DRAFT, generator=generator) * 3
    inverse = torch.tensor([-1, 0, 1, 2, 3, 4, -1, -1, -1])
    teacher = torch.randn(POSITIONS, VOCABULARY, generator=generator).log_softmax(-1)
    teacher[0, 6:9] += 8  # a position where most of the teacher's tokens, its choice too, are not there
    teacher = teacher.log_softmax(-1)
    best = teacher.topk(TOP)
    return logits, Targets.of(best.indices[:, 0], best.indices, best.values, inverse), best, inverse


def naive_loss(logits, best, inverse, kl_weight: float) -> float:
    total = 0.0
    for row, ids, log_probs in zip(logits.tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
        normalizer = math.log(sum(math.exp(value) for value in row))
        choice = inverse[ids[0]]
        if choice >= 0:
            total -= row[choice] - normalizer
        known = {int(inverse[i]): math.exp(p) for i, p in zip(ids, log_probs, strict=True) if inverse[i] >= 0}
        mass = sum(known.values())
        for index, probability in known.items():
            share = probability / mass
            total += kl_weight * share * (math.log(share) - (row[index] - normalizer))
    return total / len(logits)


@pytest.mark.parametrize("kl_weight", [0.0, 0.5, 2.0])
def test_loss_equals_a_loop_over_positions(case, kl_weight):
    logits, targets, best, inverse = case
    assert (targets.choice == IGNORED).any()
    found = distillation_loss(logits, targets, kl_weight=kl_weight)
    assert float(found) == pytest.approx(naive_loss(logits, best, inverse.tolist(), kl_weight), rel=1e-5)


def test_loss_of_a_batch_is_the_mean_of_its_parts_by_size(case):
    logits, targets, _, _ = case
    parts = []
    for start, stop in ((0, 2), (2, 7)):
        part = Targets(targets.choice[start:stop], targets.top_ids[start:stop], targets.top_probs[start:stop])
        parts.append((stop - start) * float(distillation_loss(logits[start:stop], part, kl_weight=0.5)))
    assert sum(parts) / POSITIONS == pytest.approx(float(distillation_loss(logits, targets, kl_weight=0.5)))


def test_nothing_known_gives_zero_and_no_gradient(case):
    logits = case[0].requires_grad_()
    nothing = torch.full((POSITIONS,), IGNORED)
    targets = Targets(nothing, torch.zeros(POSITIONS, TOP, dtype=torch.int64), torch.zeros(POSITIONS, TOP))
    loss = distillation_loss(logits, targets, kl_weight=0.5)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_expected_acceptance_is_the_overlap_of_the_distributions(case):
    logits, targets, best, inverse = case
    found = expected_acceptance(logits, targets)
    for index, row in enumerate(logits.softmax(-1).tolist()):
        teacher = zip(best.indices[index].tolist(), best.values[index].exp().tolist(), strict=True)
        overlap = sum(min(row[inverse[i]], p) for i, p in teacher if inverse[i] >= 0)
        assert float(found[index]) == pytest.approx(overlap, rel=1e-5)
