"""Run as a program: save a checkpoint over and over, dying at its i-th write for every i; then load what is left.

A fork dies by `os._exit` before a write, and after half of one; the parent then loads `latest` and prints a line of
JSON for each: the step that was loaded, the weight that goes with it, and what it was killed at.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator

from train.fitting.checkpoints import FitState, load_checkpoint, save_checkpoint

WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
SETTINGS = {"seed": 0}


class Killer:
    """Counts the writes below a folder; at the `number`-th the process ends."""

    def __init__(self, folder: Path, number: int, report: Path) -> None:
        self.folder, self.number, self.report, self.seen = str(folder), number, report, 0

    def point(self, name: str) -> None:
        self.seen += 1
        if self.seen == self.number:
            self.number = 0  # reporting is no write of the checkpoint
            self.report.write_text(name)
            os._exit(9)

    def audit(self, event: str, args: tuple) -> None:
        if not self.number:
            return
        writes = event in WRITES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        path = str(args[0]) if args else ""
        if writes and (path.startswith(self.folder) or not os.path.isabs(path)):
            self.point(f"{event} {Path(path).name}")

    def tear(self, module, name: str) -> None:
        """A writer in C or Rust: killed after half of its file."""
        write = getattr(module, name)

        def torn(first, second, *rest, **options):
            found = write(first, second, *rest, **options)
            path = next(Path(value) for value in (first, second) if isinstance(value, str | Path))
            if self.seen + 1 == self.number:
                os.truncate(path, path.stat().st_size // 2)
            self.point(f"half of {path.name}")
            return found

        setattr(module, name, torn)

    def before(self, module, name: str) -> None:
        write = getattr(module, name)

        def counted(*rest, **options):
            self.point(name)
            return write(*rest, **options)

        setattr(module, name, counted)


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    heads = torch.nn.Linear(4, 4)
    heads, optimizer = accelerator.prepare(heads, torch.optim.AdamW(heads.parameters()))
    out = folder / "out"

    def save(step: int) -> None:
        with torch.no_grad():
            heads.weight.fill_(float(step))
        heads(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            heads.weight.fill_(float(step))
        save_checkpoint(accelerator, out, FitState(step, score=1.0, best=1.0), SETTINGS, keep=1)

    for number in range(1, 1000):
        shutil.rmtree(out, ignore_errors=True)
        save(1)
        child = os.fork()
        if child == 0:
            killer = Killer(out, number, folder / "killed_at")
            for module, name in ((torch, "save"), (safetensors.torch, "save_file")):
                killer.tear(module, name)
            import accelerate.checkpointing
            import accelerate.utils.other

            accelerate.utils.other.safe_save_file = safetensors.torch.save_file
            killer.before(os, "fsync")
            killer.before(os, "replace")
            sys.addaudithook(killer.audit)
            save(2)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with torch.no_grad():
            heads.weight.fill_(0.0)
        state = load_checkpoint(accelerator, "latest", out, SETTINGS)
        point = (folder / "killed_at").read_text() if status else "whole"
        weight = heads.weight.unique().tolist()
        save(3)
        left = sorted(path.name for path in out.iterdir())
        print(json.dumps({"step": state.step, "weight": weight, "point": point, "status": status, "left": left}))
        if status == 0:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
