"""Distillation loss and acceptance of exit heads: pure functions of logits and the base's choices."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Targets:
    """The base's choices in draft ids; N positions, K teacher tokens.

    Attributes:
        choice: shape [N], int64, the base's choice; `IGNORED` where the draft vocabulary lacks it.
        top_ids: shape [N, K], int64, 0 where the draft vocabulary lacks the token.
        top_probs: shape [N, K], float32, 0 there; a row sums to the mass that the draft vocabulary covers.
    """

    choice: Tensor
    top_ids: Tensor
    top_probs: Tensor

    @classmethod
    def of(cls, target: Tensor, top_ids: Tensor, top_log_probs: Tensor, target_to_draft: Tensor) -> "Targets":
        """From target ids [N] and [N, K]; `target_to_draft` [vocabulary] is -1 where there is no draft id."""
        choice = target_to_draft[target]
        ids = target_to_draft[top_ids]
        return cls(
            choice=torch.where(choice < 0, IGNORED, choice),
            top_ids=ids.clamp(min=0),
            top_probs=torch.where(ids < 0, 0.0, top_log_probs.exp()),
        )


def distillation_loss(logits: Tensor, targets: Targets, *, kl_weight: float) -> Tensor:
    """Cross-entropy against the base's choice plus `kl_weight` times the divergence from its top-k tokens.

    The mean over all N positions, so that batches of different sizes combine by their sizes alone. A position
    whose choice the draft vocabulary lacks adds no cross-entropy, and one of whose teacher tokens it has none
    no divergence.

    Args:
        logits: draft logits, shape [N, V], any float dtype.
        targets: of the same positions.

    Returns:
        A scalar, float32.
    """
    log_probs = functional.log_softmax(logits.float(), dim=-1)
    total = functional.nll_loss(log_probs, targets.choice, ignore_index=IGNORED, reduction="sum")
    if kl_weight != 0:
        teacher = targets.top_probs / targets.top_probs.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        divergence = teacher * (teacher.clamp(min=1e-9).log() - log_probs.gather(-1, targets.top_ids))
        total = total + kl_weight * divergence.sum()
    return total / max(1, len(logits))


@torch.no_grad()
def expected_acceptance(logits: Tensor, targets: Targets) -> Tensor:
    """Sum over tokens of min(draft, teacher), shape [N]: the chance that a sampled draft is accepted.

    The teacher's tokens beyond its top-k are left out, so this is a lower bound.
    """
    probs = functional.softmax(logits.float(), dim=-1).gather(-1, targets.top_ids)
    return torch.minimum(probs, targets.top_probs).sum(dim=-1)
