"""`ExitLog`: what every exit drafts at every position of held-out text, for each age of the verified state.

Replay reads it. Needs no base model, lookup or policy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.temperature import likeliest
from train.features.extractor import Features

BRANCHES = 4  # drafts logged at each position


@dataclass(slots=True)
class ExitLog:
    """Drafts of every exit at N positions of some sequences, collected batch by batch.

    Attributes:
        temperatures: exit layer -> temperature used for `confidence`.
        ages: ages of the verified state, in the order of a round's drafts; see `runtime.drafting.heads.AGES`.
    """

    temperatures: Mapping[int, float]
    ages: Sequence[int]
    _sure: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)
    _uncalibrated: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)
    _tokens: dict[int, list[NDArray[np.int64]]] = field(default_factory=dict)
    _targets: list[NDArray[np.int64]] = field(default_factory=list)
    _lengths: list[int] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def collect(
        cls,
        batches: Iterable[Features],
        heads: DraftHeads,
        *,
        temperatures: Mapping[int, float],
        ages: Sequence[int],
    ) -> "ExitLog":
        """Run the heads over features."""
        logged = cls(temperatures, ages)
        for batch in batches:
            logged.add(batch, by_age(heads, batch, ages), heads.draft_to_target)
        return logged

    def add(
        self, batch: Features, logits: Sequence[Mapping[int, torch.Tensor]], draft_to_target: torch.Tensor
    ) -> None:
        """Log one batch.

        Args:
            logits: for each age, exit layer -> draft logits [N, V].
            draft_to_target: target id of each draft id, shape [V], int64, on the CPU.
        """
        count = min(BRANCHES, len(draft_to_target))
        for layer in logits[0]:
            given = [by_layer[layer] for by_layer in logits]
            calibrated = [likeliest(one, self.temperatures[layer], count) for one in given]
            plain = [likeliest(one, 1.0, count)[0] for one in given]
            ids = torch.stack([indices.T for _, indices in calibrated]).cpu()
            self._tokens.setdefault(layer, []).append(draft_to_target[ids].numpy())
            self._sure.setdefault(layer, []).append(torch.stack([values.T for values, _ in calibrated]).cpu().numpy())
            self._uncalibrated.setdefault(layer, []).append(torch.stack([values.T for values in plain]).cpu().numpy())
        self._targets.append(batch.target.cpu().numpy())
        self._lengths += batch.lengths

    @property
    def confidence(self) -> dict[int, NDArray[np.float32]]:
        """Exit layer -> calibrated confidence of its likeliest drafts, shape [ages, K, N]."""
        return _joined(self._sure)

    @property
    def uncalibrated(self) -> dict[int, NDArray[np.float32]]:
        """Exit layer -> confidence at T = 1, shape [ages, K, N]."""
        return _joined(self._uncalibrated)

    @property
    def tokens(self) -> dict[int, NDArray[np.int64]]:
        """Exit layer -> its likeliest drafts, target ids, shape [ages, K, N]."""
        return _joined(self._tokens)

    @property
    def targets(self) -> NDArray[np.int64]:
        """The base's choice, shape [N]."""
        return np.concatenate(self._targets)

    @property
    def sequence(self) -> NDArray[np.int64]:
        """Index of each position's sequence, shape [N]."""
        return np.repeat(np.arange(len(self._lengths)), self._lengths)


def by_age(heads: DraftHeads, batch: Features, ages: Sequence[int]) -> list[dict[int, torch.Tensor]]:
    """For each age, exit layer -> draft logits [N, V]."""
    if batch.prompts is None:  # heads that do not attend
        return [heads(batch.hidden, batch.context(age)) for age in ages]
    every = heads(batch.hidden, batch.context(ages))  # a later draft is made of those before: one pass makes all
    return [{layer: logits[index] for layer, logits in every.items()} for index in range(len(ages))]


def _joined(parts: Mapping[int, list[NDArray[Any]]]) -> dict[int, NDArray[Any]]:
    return {layer: np.concatenate(arrays, axis=-1) for layer, arrays in parts.items()}
