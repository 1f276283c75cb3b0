"""Python programs as forks of one process that has imported what they need: a start takes no seconds.

That process has no threads, so that its forks are safe; it is started at first use, and ends with the tests.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.run
from torch.distributed.launcher import api
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.helpers.programs.forks", "train.fit_exits", "accelerate.commands.accelerate_cli"]
)


def run(command: list[str], *, env: Mapping[str, str] | None = None, **_: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`; what is printed on either stream is the result's `stdout`.

    Args:
        command: `[sys.executable, script, ...]` or `[sys.executable, "-m", module, ...]`; launchers fork workers.
        env: all of it. What libraries read while they are imported is that of the first call.
    """
    assert command[0] == sys.executable
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "printed")
        environment = dict(os.environ if env is None else env)
        process = CONTEXT.Process(target=_program, args=(command[1:], environment, os.getcwd(), printed))
        process.start()
        try:
            process.join()
        finally:
            if process.is_alive():
                os.killpg(process.pid or 0, signal.SIGKILL)
        code = process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(command, code, printed.read_text(errors="replace"), "")


def _program(command: list[str], environment: dict[str, str], folder: str, printed: Path) -> None:
    """The forked process itself."""
    os.setsid()
    os.chdir(folder)
    with printed.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    api.elastic_launch = torch.distributed.run.elastic_launch = _launcher  # type: ignore[misc, assignment]
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        _script(*command)


def _launcher(config: LaunchConfig, entrypoint: str) -> Callable[..., Any]:
    """In the place of elastic's: what it launches, `python -u script ...`, runs in forks."""
    config.start_method = "fork"
    launch = elastic_launch(config, _worker)
    return lambda unbuffered, *command: launch(*command)


def _worker(*command: str) -> None:
    """One process of several: it stops as Python does, not as the launcher that it was forked from."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _script(*command)


def _script(path: str, *flags: str) -> None:
    """As `python path flags`."""
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")
