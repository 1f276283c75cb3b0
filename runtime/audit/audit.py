"""An audit of prompts from a file, prompt by prompt, with what it was run on.

The report is rewritten after every prompt, so that hours of work survive a cut, and can be resumed. Knows no
comparison rule: that is `divergence`'s.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from runtime.audit.divergence import audit
from runtime.audit.record import earlier_entries, write_report
from runtime.conditions import conditions

FORMAT = 1


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """What an audit compares, and how.

    Attributes:
        prompts: a .jsonl or .json file; the first turn of each is asked.
        limit: this many prompts, spread evenly over the file; None for all.
        options: of `generate`.
        concurrency: prompts that SpecBound decodes together.
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
    concurrency: int = 1


def run_audit(
    settings: AuditSettings, model: Any, ids: Sequence[Tensor], *, report: Path | None = None, resume: bool = False
) -> dict[str, Any]:
    """Audit and report.

    Args:
        model: with the adapter of the settings.
        ids: of each prompt, shape [1, T], int64.
        report: written anew after every prompt.
        resume: go on from what `report` holds, which must be of the same settings and machine.

    Returns:
        JSON values: `tokens`, `differing_tokens`, `differing_logits`, `prompts`, `identical_prompts`,
        `speedup` (stock seconds over SpecBound's, summed), `complete`, the `conditions` of the run, its
        `certificate` and its `findings`, one a prompt.

    Raises:
        DataError: the report to resume is of another audit.
    """
    held = _conditions(settings, model)
    findings: list[dict[str, Any]] = []
    if report is not None and resume:
        findings = earlier_entries(report, "findings", held, under="conditions")
    outcome = summary(findings, len(ids), held, model)
    with tqdm(total=len(ids), initial=len(findings), desc="audit", unit="prompt") as bar:
        left, how = ids[len(findings) :], {"seed": settings.seed, "concurrency": settings.concurrency}
        for finding in audit(model, left, **how, **settings.options):
            findings.append(finding.to_dict())
            outcome = summary(findings, len(ids), held, model)
            if report is not None:
                write_report(report, outcome)
            bar.set_postfix_str(f"{outcome['differing_tokens']} differing tokens")
            bar.update()
    return outcome


def summary(findings: list[dict[str, Any]], total: int, held: dict[str, Any], model: Any) -> dict[str, Any]:
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
        "conditions": held,
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
        **conditions(model.device, model.dtype),
        "format": FORMAT,
    }
