"""What a figure was measured on: the report of hardware, dtype, threads and versions that stands beside it."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from runtime.adapter.config import VERSION


def conditions(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """As JSON values: `hardware`, `dtype` (where given), `threads` and `versions`."""
    fields: dict[str, Any] = {"hardware": hardware(device)}
    if dtype is not None:
        fields["dtype"] = str(dtype).removeprefix("torch.")
    return fields | {"threads": torch.get_num_threads(), "versions": versions()}


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide bits and speed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "specbound": VERSION,
    }


def hardware(device: torch.device) -> str:
    """Name of the device and, for a CPU, its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
