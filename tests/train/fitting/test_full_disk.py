"""A checkpoint on a disk that has no room for it: one line, on every process, and nothing left behind."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from runtime.errors import ConfigError
from tests.helpers.paths import ROOT
from tests.helpers.programs import forks
from train.fitting.checkpoints import FitState, find_checkpoints, load_checkpoint, save_checkpoint

ROW = 1000  # values in a row of the heads: 4 kB, and 8 kB of the optimizer


def made(rows: int) -> Accelerator:
    """An accelerator with heads of that many rows, after a step."""
    accelerator = Accelerator(cpu=True)
    heads = torch.nn.Linear(ROW, rows)
    heads, optimizer = accelerator.prepare(heads, torch.optim.AdamW(heads.parameters()))
    heads(torch.ones(1, ROW)).sum().backward()
    optimizer.step()
    return accelerator


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("kilobytes", [4, 8, 16, 20, 24, 32, 40])
def test_a_full_disk_is_one_line_and_does_not_stay_full(disk: Callable[[int], Path], kilobytes: int) -> None:
    folder, accelerator = disk(kilobytes), made(2)
    with pytest.raises(
        ConfigError, match=r"^checkpoint-1 cannot be written in .*; \d+ bytes free\): make room"
    ) as said:
        save_checkpoint(accelerator, folder, FitState(1), {}, keep=2)
    assert "\n" not in str(said.value)
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_older_checkpoint_stays_whole(disk: Callable[[int], Path]) -> None:
    """There is room for one of 44 kB."""
    folder, accelerator = disk(80), made(2)
    save_checkpoint(accelerator, folder, FitState(1), {}, keep=2)
    with pytest.raises(ConfigError, match="checkpoint-2 cannot be written"):
        save_checkpoint(accelerator, folder, FitState(2), {}, keep=2)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"] == [p.name for p in find_checkpoints(folder)]
    assert load_checkpoint(accelerator, "latest", folder, {}) == FitState(1)


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_error_that_is_not_the_disks_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Accelerator, folder: str) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing, says another")

    accelerator = made(1)
    monkeypatch.setattr(Accelerator, "save_state", fail)
    with pytest.raises(RuntimeError, match="says another"):
        save_checkpoint(accelerator, tmp_path, FitState(1), {}, keep=2)


PROGRAM = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from runtime.errors import ConfigError
from train.fitting.checkpoints import FitState, save_checkpoint

accelerator = Accelerator(cpu=True)
accelerator.prepare(torch.nn.Linear(1000, 100))  # the first process writes 400 kB, the second its random states
try:
    save_checkpoint(accelerator, Path(sys.argv[1]), FitState(1), {}, keep=2)
except ConfigError as error:
    Path(sys.argv[2], f"said-{accelerator.process_index}").write_text(str(error))
    accelerator.wait_for_everyone()
    sys.exit(1)
"""


@pytest.mark.parametrize("kilobytes", [20, 200])
def test_two_processes_say_the_same(disk: Callable[[int], Path], tmp_path: Path, kilobytes: int) -> None:
    folder, program = disk(kilobytes), tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command += [str(folder), str(tmp_path)]
    ended = forks.run(command, env=environment)
    said = [path.read_text() for path in tmp_path.glob("said-*")]
    assert len(said) == 2, ended.stdout
    assert said[0] == said[1] and said[0].startswith("checkpoint-1 cannot be written in") and "\n" not in said[0]
    assert not list(folder.iterdir())
