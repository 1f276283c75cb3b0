"""Figures of exit heads on text: agreement, expected acceptance, precision and coverage. Knows no files."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.temperature import confidence
from train.calibration.exit_log import ExitLog, by_age
from train.features.extractor import Features
from train.fitting.losses import Targets, distillation_loss, expected_acceptance
from train.replay.simulation import Simulation

THRESHOLD = 0.8
BEST = 4  # tokens among which `recall` looks for the base's choice


@torch.no_grad()
def evaluate(
    batches: Iterable[Features],
    heads: DraftHeads,
    *,
    kl_weight: float,
    ages: Sequence[int],
    simulation: Simulation | None = None,
) -> dict[str, float]:
    """Means over all positions, by exit, under the keys `held_out/<figure>/layer_<NN>`: as a round's first draft.

    Figures: `loss`; `agreement` with the base's choice; `recall`, that it is among the 4 likeliest; `acceptance`, the
    chance that a sampled draft is accepted; `precision` and `coverage` of drafts whose confidence (at T = 1) is at
    least 0.8; `agreement_<j>` and `recall_<j>` as the round's j-th draft. Also `held_out/chance`, the agreement of
    always the same token; and with a simulation what replay says of these heads.

    Args:
        ages: those of the heads.
    """
    sums: dict[str, float] = {}
    log: ExitLog | None = None
    said: list[int] = []
    positions = 0
    for batch in batches:
        targets = Targets.of(batch.target, batch.top_ids, batch.top_log_probs, heads.target_to_draft)
        number = len(batch.target)
        positions += number
        each = by_age(heads, batch, ages)
        if simulation is not None:
            log = log or ExitLog(dict.fromkeys(each[0], 1.0), ages)
            log.add(batch, each, heads.draft_to_target)
        for layer, logits in each[0].items():
            later = {ages[index] or index + 1: each[index][layer] for index in range(1, len(ages))}
            values = _figures(logits, later, targets, kl_weight)
            for name, value in values.items():
                key = f"held_out/{name}/layer_{layer:02d}"
                sums[key] = sums.get(key, 0.0) + value
        said += batch.target.tolist()
    means = _means(sums, positions) | {"held_out/chance": max(Counter(said).values(), default=0) / max(1, positions)}
    if simulation is None or log is None:
        return means
    return means | simulation.figures(log)


def _figures(
    logits: torch.Tensor, later: Mapping[int, torch.Tensor], targets: Targets, kl_weight: float
) -> dict[str, float]:
    """Sums over the positions of a batch, of one exit's logits [N, V] as the first draft and as the j-th."""
    correct = logits.argmax(-1) == targets.choice
    confident = confidence(logits, 1.0) >= THRESHOLD
    values = {
        "loss": float(distillation_loss(logits, targets, kl_weight=kl_weight)) * len(logits),
        "agreement": float(correct.sum()),
        "recall": _recalled(logits, targets.choice),
        "acceptance": float(expected_acceptance(logits, targets).sum()),
        "confident": float(confident.sum()),
        "confident_and_correct": float((confident & correct).sum()),
    }
    for draft, one in later.items():
        values[f"agreement_{draft}"] = float((one.argmax(-1) == targets.choice).sum())
        values[f"recall_{draft}"] = _recalled(one, targets.choice)
    return values


def _recalled(logits: torch.Tensor, choice: torch.Tensor) -> float:
    """Number of positions whose choice [N] is among the likeliest tokens by logits [N, V]."""
    best = logits.topk(min(BEST, logits.shape[-1])).indices
    return float((best == choice[:, None]).any(-1).sum())


def show(step: int, values: dict[str, float]) -> str:
    """The figures of one evaluation as text, a line an exit."""
    lines = []
    for key in sorted(key for key in values if "/agreement/" in key):
        of = {
            name: values[key.replace("agreement", name)] for name in ("acceptance", "precision", "coverage", "recall")
        }
        lines.append(
            f"step {step} {key.rpartition('/')[2]}: agreement {values[key]:.3f}, "
            f"among its {BEST} best {of['recall']:.3f}, expected acceptance "
            f"{of['acceptance']:.3f}, at confidence {THRESHOLD} precision {of['precision']:.3f} "
            f"coverage {of['coverage']:.3f}"
        )
    if "held_out/accepted_length" in values:
        length, speed = values["held_out/accepted_length"], values["held_out/predicted_speedup"]
        lines.append(f"step {step} by replay: mean accepted length {length:.2f}, {speed:.2f}x by layer counts")
    return "\n".join(lines)


def _means(sums: dict[str, float], positions: int) -> dict[str, float]:
    means = {key: value / max(1, positions) for key, value in sums.items() if "/confident" not in key}
    for key, value in sums.items():
        if "/confident/" in key:
            correct = sums[key.replace("/confident/", "/confident_and_correct/")]
            means[key.replace("/confident/", "/coverage/")] = value / max(1, positions)
            means[key.replace("/confident/", "/precision/")] = correct / value if value else 0.0
    return means
