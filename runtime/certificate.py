"""`Certificate`: what the exactness probe checked and found, for whom it holds, and its file.

Knows nothing of how it came about.
"""

import hashlib
import json
import logging
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from runtime.execution import ExecutionPolicy, Shape
from runtime.files import write_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the probe checked and found.

    Attributes:
        bitwise: whether every row compared under the policy had the bits of one-token decoding.
        max_width: widest block checked, in tokens; 1 where no policy passes.
        rowwise_attention, rowwise_linears: the policy; weight shapes [out, in] of the Linears run row by row.
        rows_checked, rows_differing: rows of logits and cache compared with stock's, under the policy.
        device, dtype, threads, versions: what it holds for.
        seconds: what the probe took; 0 where it was read from disk.
    """

    bitwise: bool
    max_width: int
    rowwise_attention: bool
    rowwise_linears: tuple[Shape, ...] | None
    rows_checked: int
    rows_differing: int
    device: str
    dtype: str
    threads: int
    versions: str
    seconds: float

    @property
    def policy(self) -> ExecutionPolicy:
        """The execution it certifies."""
        shapes = None if self.rowwise_linears is None else frozenset(self.rowwise_linears)
        return ExecutionPolicy(self.rowwise_attention, shapes)

    def __str__(self) -> str:
        if self.rowwise_linears is None:
            by_row = "every Linear"
        else:
            by_row = ", ".join(f"Linear {shape[0]}x{shape[1]}" for shape in self.rowwise_linears) or "no Linear"
        attention = "attention and " if self.rowwise_attention else ""
        state = "bit for bit equal to one-token decoding" if self.bitwise else "NOT bit for bit"
        return (
            f"{state}: {self.rows_differing} of {self.rows_checked} rows differ in blocks of up to {self.max_width} "
            f"tokens; {attention}{by_row} row by row ({self.device}, {self.dtype}, {self.threads} threads, "
            f"{self.versions})"
        )


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
        shapes = fields["rowwise_linears"]
        fields["rowwise_linears"] = None if shapes is None else tuple(tuple(shape) for shape in shapes)
        return Certificate(**(fields | {"seconds": 0.0}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_certificate(path: Path, certificate: Certificate) -> None:
    """Keep a certificate; a cache folder that cannot be written only costs the next probe."""
    try:
        write_atomic(path, json.dumps(asdict(certificate)).encode())
    except OSError as error:
        logger.info("certificate not kept: %s", error)
