"""Figures of exit heads on text: agreement, expected acceptance, precision and coverage. Knows no files."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.temperature import confidence
from train.calibration.exit_log import ExitLog
from train.features.extractor import Features
from train.fitting.losses import Targets, distillation_loss, expected_acceptance
from train.replay.simulation import Simulation

THRESHOLD = 0.8


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

    Figures: `loss`; `agreement` with the base's choice; `acceptance`, the chance that a sampled draft is
    accepted; `precision` and `coverage` of drafts whose confidence (at T = 1) is at least 0.8. Also `held_out/chance`,
    the agreement of always the same token; and with a simulation what replay says of these heads.

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
        by_age = [heads(batch.hidden, batch.context(age)) for age in ages]
        if simulation is not None:
            log = log or ExitLog(dict.fromkeys(by_age[0], 1.0), ages)
            log.add(batch, by_age, targets.choice)
        for layer, logits in by_age[0].items():
            correct = logits.argmax(-1) == targets.choice
            confident = confidence(logits, 1.0) >= THRESHOLD
            values = {
                "loss": float(distillation_loss(logits, targets, kl_weight=kl_weight)) * number,
                "agreement": float(correct.sum()),
                "acceptance": float(expected_acceptance(logits, targets).sum()),
                "confident": float(confident.sum()),
                "confident_and_correct": float((confident & correct).sum()),
            }
            for name, value in values.items():
                key = f"held_out/{name}/layer_{layer:02d}"
                sums[key] = sums.get(key, 0.0) + value
        said += batch.target.tolist()
    means = _means(sums, positions) | {"held_out/chance": max(Counter(said).values(), default=0) / max(1, positions)}
    if simulation is None or log is None:
        return means
    return means | simulation.figures(log)


def show(step: int, values: dict[str, float]) -> str:
    """The figures of one evaluation as text, a line an exit."""
    lines = []
    for key in sorted(key for key in values if "/agreement/" in key):
        of = {name: values[key.replace("agreement", name)] for name in ("acceptance", "precision", "coverage")}
        lines.append(
            f"step {step} {key.rpartition('/')[2]}: agreement {values[key]:.3f}, expected acceptance "
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
