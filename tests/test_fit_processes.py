"""Fits as their launchers start them: one process, two over gloo, DeepSpeed ZeRO-2; all the same losses."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.adapter import load_adapter

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "train" / "fit_exits.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
CPU = {"ACCELERATE_USE_CPU": "true"}


def run_group(command: list[str], environment: dict[str, str]) -> str:
    """Run a launcher that must succeed; returns what it printed. Its workers end with it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    with subprocess.Popen(command, env=environment, **options) as process:
        try:
            printed, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def launch(make_recipe, tmp_path_factory):
    """`launch(command, environment, **settings)`: run a fit; its losses, one a step, and all it printed."""

    def start(command: list[str], environment: dict[str, str], **settings) -> tuple[list[float], str]:
        folder = tmp_path_factory.mktemp("fit")
        (folder / "recipe.yaml").write_text(json.dumps(make_recipe(folder / "out", max_steps=6, **settings)))
        printed = run_group([*command, SCRIPT, "--config", str(folder / "recipe.yaml")], environment)
        assert load_adapter(folder / "out" / "adapter").config.exit_layers == (2, 4)
        lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        return [line["fit/loss"] for line in lines], printed

    return start


@pytest.fixture(scope="module")
def alone(launch):
    """Losses of one process under `accelerate launch`."""
    config = ["--config_file", str(ROOT / "configs/accelerate/cpu.yaml")]
    losses, printed = launch([*ACCELERATE, *config], {})
    assert "1 process(es) on cpu" in printed
    for chatter in ("[RANK", "Saving current state", "real_accelerator"):
        assert chatter not in printed
    for bar in ("fit", "calibrate", "tune"):
        assert f"{bar}: " in printed
    return losses


def test_two_processes_learn_what_one_does(launch, alone):
    losses, printed = launch(TORCHRUN, CPU, per_device_train_batch_size=4)
    assert "2 process(es) on cpu" in printed
    assert losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs deepspeed, and a compiler for its CPU communication",
)
def test_two_processes_under_zero_2_learn_what_one_does(launch, alone):
    config = ["--config_file", str(ROOT / "configs/accelerate/zero2_cpu.yaml"), "--main_process_port", "0"]
    losses, printed = launch([*ACCELERATE, *config], {}, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert "2 process(es) on cpu" in printed
    assert losses == pytest.approx(alone, rel=1e-4)
