"""`Certificate`: what the exactness probe checked and found, for whom it holds, and its file.

Knows nothing of how it came about.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from runtime.exact.execution import ExecutionPolicy, Shape
from runtime.exact.native.library import why_not_native
from runtime.files import write_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the probe checked and found.

    Attributes:
        bitwise: whether every row compared under the policy had the bits of one-token decoding.
        max_width: widest block checked, in tokens; 1 where no policy passes.
        longest_context: keys that the rows furthest into a text attended to, in tokens.
        policy: how blocks are computed.
        rows_checked, rows_differing: rows of logits and cache compared with stock's, under the policy.
        largest_shift: the most that a logit differed from stock's.
        native: shapes of packed Linears that our own kernel multiplies, with the bits of torch's.
        device, dtype, threads, versions: what it holds for.
        seconds: what the probe took; 0 where it was read from disk.
    """

    bitwise: bool
    max_width: int
    longest_context: int
    policy: ExecutionPolicy
    rows_checked: int
    rows_differing: int
    largest_shift: float
    native: Sequence[Shape]
    device: str
    dtype: str
    threads: int
    versions: str
    seconds: float

    def __str__(self) -> str:
        state = "bit for bit equal to one-token decoding" if self.bitwise else "NOT bit for bit"
        shift = f", logits by up to {self.largest_shift:.3g}" if self.rows_differing else ""
        return (
            f"{state}: {self.rows_differing} of {self.rows_checked} rows differ{shift}, in blocks of up to"
            f" {self.max_width} tokens and contexts of up to {self.longest_context};"
            f" {_describe(self.policy)}{self._kernels()}"
            f" ({self.device}, {self.dtype}, {self.threads} threads, {self.versions})"
        )

    def _kernels(self) -> str:
        """What ran native, in words; why nothing could, where packed Linears might have."""
        if self.native:
            return f"; native: Linear {', '.join(_size(shape) for shape in self.native)}"
        reason = why_not_native()
        return f"; nothing native: {reason}" if self.policy.packed_rows and reason else ""


def _describe(policy: ExecutionPolicy) -> str:
    """What runs row by row or padded, in words."""
    by_row = ["attention"] if policy.attention == "rowwise" else []
    unpacked = {shape: rows for shape, rows in policy.linear_rows.items() if shape not in policy.packed_rows}
    by_row += [f"Linear {_size(shape)}" for shape, rows in sorted(unpacked.items()) if rows == 1]
    by_row += ["every Linear"] if policy.other_rows == 1 else []
    padded = [f"Linear {_size(shape)} to {rows}" for shape, rows in sorted(unpacked.items()) if rows > 1]
    by_row += [f"packed Linear {_size(shape)}" for shape, rows in sorted(policy.packed_rows.items()) if rows == 1]
    parts = [f"row by row: {', '.join(by_row) or 'nothing'}"]
    if padded:
        parts.append(f"padded rows: {', '.join(padded)}")
    if policy.packed_rows:
        parts.append(f"packed: Linear {', '.join(_size(shape) for shape in sorted(policy.packed_rows))}")
    if policy.attention.startswith("native"):
        parts.append(f"attention native ({policy.attention.removeprefix('native_')})")
    if policy.attention == "grouped":
        parts.append("attention in groups of rows")
    if policy.fused:
        parts.append("layers native" if policy.native else "layers fused")
    if policy.prompts:
        parts.append("prompts native")
    if policy.static:
        parts.append("segments of fixed shapes")
    return "; ".join(parts)


def _size(shape: Shape) -> str:
    return "x".join(str(length) for length in shape)


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What bits depend on besides the weights: device, dtype, threads, versions."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_processor()}"
    return {
        "device": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _processor() -> str:
    """Name of the CPU, so that a certificate is not taken to another machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("model name", "model\t", "stepping", "flags")
        parts = [line for line in lines if line.startswith(wanted)]
        text = "\n".join(dict.fromkeys(parts))
        name = next((line.partition(":")[2].strip() for line in parts if line.startswith("model name")), "cpu")
        return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:8]}"
    except OSError:
        return platform.processor() or platform.machine()


def read_certificate(path: Path) -> Certificate | None:
    """A stored certificate; None where there is none that can be read."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        stored = fields["policy"]
        rows = {tuple(shape): count for shape, count in stored["linear_rows"]}
        packed = {tuple(shape): count for shape, count in stored["packed_rows"]}
        how = (
            stored["attention"],
            rows,
            stored["other_rows"],
            packed,
            stored["fused"],
            stored["native"],
            stored["static"],
            stored["expert_rows"],
            stored["prompts"],
        )
        fields["policy"] = ExecutionPolicy(*how)
        fields["native"] = [tuple(shape) for shape in fields["native"]]
        return Certificate(**(fields | {"seconds": 0.0}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_certificate(path: Path, certificate: Certificate) -> None:
    """Keep a certificate; a cache folder that cannot be written only costs the next probe."""
    policy = certificate.policy
    fields = {name: getattr(certificate, name) for name in Certificate.__slots__}
    fields["policy"] = {
        "attention": policy.attention,
        "linear_rows": sorted(policy.linear_rows.items()),
        "other_rows": policy.other_rows,
        "packed_rows": sorted(policy.packed_rows.items()),
        "fused": policy.fused,
        "native": policy.native,
        "static": policy.static,
        "expert_rows": policy.expert_rows,
        "prompts": policy.prompts,
    }
    try:
        write_atomic(path, json.dumps(fields).encode())
    except OSError as error:
        logger.info("certificate not kept: %s", error)
