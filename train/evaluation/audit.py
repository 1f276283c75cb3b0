"""`specbound audit`: prompts from a file through `train.evaluation.divergence`, with what it was run on.

The report is rewritten after every prompt, so that hours of work survive a cut, and can be resumed. Knows no
comparison rule: that is `train.evaluation.divergence`'s.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from train.cli.attached import load_attached, read_spread, to_ids
from train.evaluation.comparison import hardware
from train.evaluation.divergence import audit
from train.evaluation.record import earlier_entries, write_report

FORMAT = 1


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """What an audit compares, and how.

    Attributes:
        prompts: a .jsonl file or the name of a data set; the first turn of each is asked.
        limit: this many prompts, spread evenly over the file; None for all.
        options: of `generate`.
    """

    adapter: str
    prompts: str
    base_model: str | None = None
    limit: int | None = None
    dtype: str = "bfloat16"
    threads: int | None = None
    seed: int = 0
    exactness: str = "bitwise"
    options: dict[str, Any] = field(default_factory=dict)


def run_audit(settings: AuditSettings, *, report: Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Audit and report.

    Args:
        report: written anew after every prompt.
        resume: go on from what `report` holds, which must be of the same settings and machine.

    Returns:
        JSON values: `tokens`, `differing_tokens`, `differing_logits`, `prompts`, `identical_prompts`,
        `speedup` (stock seconds over SpecBound's, summed), `complete`, the `conditions` of the run, its
        `certificate` and its `findings`, one a prompt.

    Raises:
        SpecBoundError: wrong options, prompts, adapter or base; a report to resume that is of another audit.
    """
    prompts = read_spread(settings.prompts, settings.limit)  # before the model, which takes longer
    model = load_attached(
        settings.adapter,
        settings.base_model,
        dtype=settings.dtype,
        threads=settings.threads,
        exactness=settings.exactness,
        adaptive=False,  # a model at rest would show little
    )
    ids = to_ids(model, prompts)
    conditions = _conditions(settings, model)
    findings: list[dict[str, Any]] = []
    if report is not None and resume:
        findings = earlier_entries(report, "findings", conditions, under="conditions")
    found = summary(findings, len(ids), conditions, model)
    with tqdm(total=len(ids), initial=len(findings), desc="audit", unit="prompt") as bar:
        for finding in audit(model, ids[len(findings) :], seed=settings.seed, **settings.options):
            findings.append(finding.to_dict())
            found = summary(findings, len(ids), conditions, model)
            if report is not None:
                write_report(report, found)
            bar.set_postfix_str(f"{found['differing_tokens']} differing tokens")
            bar.update()
    return found


def summary(findings: list[dict[str, Any]], total: int, conditions: dict[str, Any], model: Any) -> dict[str, Any]:
    """The report on the prompts audited so far, of `total`."""
    stock, specbound = (sum(one[f"{name}_seconds"] for one in findings) for name in ("stock", "specbound"))
    return {
        "complete": len(findings) == total,
        "prompts": len(findings),
        "identical_prompts": sum(one["differing"] == 0 for one in findings),
        "tokens": sum(one["tokens"] for one in findings),
        "differing_tokens": sum(one["differing"] for one in findings),
        "differing_logits": sum(one["differing_logits"] for one in findings),
        "speedup": round(stock / specbound, 3) if specbound else None,
        "conditions": conditions,
        "certificate": str(model.specbound.certificate),
        "findings": findings,
    }


def _conditions(settings: AuditSettings, model: Any) -> dict[str, Any]:
    """What the figures hold for; names of files without their folders."""
    return {
        **asdict(settings),
        "adapter": Path(settings.adapter).name if Path(settings.adapter).exists() else settings.adapter,
        "adapter_sha256": model.specbound.config.weights_sha256,
        "prompts": Path(settings.prompts).name,
        "base_model": model.specbound.config.base_model_name_or_path,
        "base_fingerprint": model.specbound.prepared.fingerprint,
        "threads": torch.get_num_threads(),
        "hardware": hardware(model.device),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "format": FORMAT,
    }
