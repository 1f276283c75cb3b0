"""All that this project wants to know of a GPU: its tests, its bits, its speeds, a short fit; one JSON.

Each step is a process with a limit of its own; one that fails is told, and the next one runs. Nothing is downloaded:
the base's folder comes along. Without a GPU the same steps run on the CPU, with `--tiny` on small shapes. Quoted in
docs/benchmark.md. Example:
bash scripts/measure/gpu.sh --base outputs/base --adapter adapters/smollm2-135m-instruct --json gpu.json
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from runtime.adapter.hub import kept_base
from runtime.conditions import conditions
from runtime.errors import one_line
from runtime.files import check_writable, write_atomic

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHAPES = ["lmsys/vicuna-7b-v1.5", "codellama/CodeLlama-13b-Instruct-hf"]
TESTS = [
    "tests/runtime/exact/test_graphs.py",
    "tests/runtime/exact/test_graph_limits.py",
    "tests/runtime/exact/test_order.py",
]
WIDTHS = ["2", "3", "4", "8", "16"]
KEPT_LINES, KEPT_LINES_OF_A_FAILURE = 3, 40
PYTHON = [sys.executable, "-m"]


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        seconds: its limit.
        report: the JSON file that it writes, or a log with an object a line; None where its last line says all.
    """

    name: str
    command: list[str]
    seconds: float
    report: Path | None = None


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Keep everything in this file.")],
    base: Annotated[Path | None, typer.Option(help="Folder of the base; by default where it was fetched to.")] = None,
    adapter: Annotated[Path, typer.Option(help="Folder of its adapter.")] = Path("adapters/smollm2-135m-instruct"),
    prompts: Annotated[Path, typer.Option(help="A .jsonl file.")] = Path("configs/data/demo_prompts.jsonl"),
    only: Annotated[list[str] | None, typer.Option(help="Run this step only; may be given several times.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes, few prompts: does it run?")] = False,
) -> None:
    """Run every step, print what came of it, keep the reports; exit code 1 where a step failed."""
    check_writable(json_file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = conditions(device) | {"tiny": tiny, "steps": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for step in steps(base or kept_base(SMOLLM2), adapter, prompts, Path(scratch), device.type, tiny=tiny):
            if only and step.name not in only:
                continue
            report["steps"][step.name] = run(step)
            write_atomic(json_file, (json.dumps(report, indent=1) + "\n").encode())
    if any("error" in step for step in report["steps"].values()):
        raise typer.Exit(1)


def steps(base: Path, adapter: Path, prompts: Path, scratch: Path, device: str, *, tiny: bool) -> list[Step]:
    """The steps in the order of their worth, should time run out."""
    limit, tokens = ("2", "4") if tiny else ("8", "64")
    asked = ["--adapter", str(adapter), "--model", str(base), "--prompts", str(prompts), "--limit", limit]
    asked += ["--device", device, "--max-new-tokens", tokens, "--dtype", "float32" if tiny else "bfloat16"]
    files = {name: scratch / f"{name}.json" for name in ("rows", "audit", "bench", "scale")}
    rows = ["scripts/measure/rows.py", "--device", device, "--json", str(files["rows"]), *(["--tiny"] if tiny else [])]
    rows += [part for width in WIDTHS for part in ("--width", width)]
    scale = ["scripts/measure/scale.py", str(adapter), *SHAPES, "--device", device, "--json", str(files["scale"])]
    scale += ["--exactness", "batched"]  # what a further row costs where nothing is asked of its bits
    bench = ["--methods", "stock,plain,specbound,prompt_lookup", "--json", str(files["bench"])]
    tests = ["pytest", "-q", *TESTS, *(["-k", "another_order"] if tiny else [])]
    fitted = scratch / "fit"
    fit = ["train/fit_exits.py", "--config", str(recipe(base, prompts, fitted, tiny))]
    plan = [
        Step("rows", [sys.executable, *rows], 120, files["rows"]),
        Step("tests", [*PYTHON, *tests], 180),
        Step("audit", [*PYTHON, "train.cli.app", "audit", *asked, "--json", str(files["audit"])], 120, files["audit"]),
        Step("bench", [*PYTHON, "train.cli.app", "bench", *asked, *bench], 120, files["bench"]),
        Step("fit", [sys.executable, *fit], 150, fitted / "metrics.jsonl"),
        Step("scale", [sys.executable, *scale], 180, files["scale"]),
    ]
    return plan[:-1] if tiny else plan  # shapes of 7B are not tiny


def recipe(base: Path, prompts: Path, fitted: Path, tiny: bool) -> Path:
    """Write the settings of a short fit; returns their file."""
    settings: dict[str, Any] = {
        "model_name_or_path": str(base),
        "prompts": [str(prompts)],
        "output_dir": str(fitted),
        "exit_layers": [2, 4] if tiny else [2, 8],
        "dtype": "float32" if tiny else "bfloat16",
        "max_new_tokens": 16 if tiny else 64,
        "max_steps": 2 if tiny else 60,
        "head_rank": 4 if tiny else 256,
        "draft_vocab_size": 64 if tiny else 6144,
        "calibration_fraction": 0.4,
        "prompt_limit": 60 if tiny else 200,
    }
    file = fitted.with_suffix(".yaml")
    file.write_text(json.dumps(settings))
    return file


def run(step: Step) -> dict[str, Any]:
    """Its seconds, and its report, its last lines or its error."""
    console, started = Console(highlight=False), time.perf_counter()
    try:
        done = subprocess.run(
            step.command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=step.seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        lines = _lines(done.stdout) + _lines(done.stderr)
        error = None if done.returncode == 0 else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as failure:
        lines, error = _lines(failure.stdout) + _lines(failure.stderr), f"stopped after {step.seconds:.0f} s"
    except OSError as failure:
        lines, error = [], one_line(failure)
    kept = KEPT_LINES if error is None else KEPT_LINES_OF_A_FAILURE
    outcome: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1), "last": lines[-kept:]}
    if error is not None:
        outcome["error"] = error
    if step.report is not None and step.report.exists():
        text = step.report.read_text(encoding="utf-8")
        outcome["report"] = json.loads(text.splitlines()[-1] if step.report.suffix == ".jsonl" else text)
    console.print(f"{step.name:<8} {outcome['seconds']:7.1f} s  {error or (lines or [''])[-1]}")
    return outcome


def _lines(output: str | bytes | None) -> list[str]:
    """Those that are not empty; the output of a process that was stopped comes as bytes."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return [line for line in text.splitlines() if line.strip()]


if __name__ == "__main__":
    typer.run(main)
