"""What a fit needs before it starts: a folder that can be written, processes, trackers, a quiet log; and how it fails.

Knows no model and no text.
"""

import fcntl
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging as transformers_logging

from runtime.errors import ConfigError, SpecBoundError
from runtime.files import disk_line
from train.fitting.checkpoints import find_checkpoints
from train.settings.fit_config import FitConfig
from train.settings.recipe import nearest


def quiet_logs() -> None:
    """Our own lines at INFO; of the libraries only warnings, so that the lines and bars can be read."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("accelerate", "datasets", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if not torch.accelerator.is_available():  # DeepSpeed, which accelerate imports, would announce this twice
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within `with`: what the user can mend, a full disk included, ends the program: one line on stderr, code 1."""
    try:
        yield
    except Exception as error:  # what writes raises errors of many kinds
        line = str(error) if isinstance(error, SpecBoundError) else disk_line(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")


def check_output_dir(config: FitConfig) -> None:
    """Check that the output folder can be written and holds no other run, before anything is loaded.

    Nothing is created: a fit that fails at its base or its prompts leaves no folder behind.

    Raises:
        ConfigError: it cannot be written, or holds checkpoints that this run is not to continue.
    """
    path = Path(config.output_dir)
    try:
        nearest_folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=nearest_folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output_dir {config.output_dir!r} cannot be written ({error.strerror}): name another"
        ) from None
    checkpoints = find_checkpoints(path)
    if checkpoints and config.resume_from_checkpoint is None:
        raise ConfigError(
            f"output_dir {config.output_dir!r} holds {checkpoints[-1].name} of an earlier run: continue it with"
            " --resume_from_checkpoint latest, or name another output_dir"
        )


@contextmanager
def sole_writer(config: FitConfig) -> Iterator[None]:
    """Hold the output folder against other fits while this one lives; the lock goes with the process.

    Empty folders are removed at the end, also those above that were made: a fit that fails at its base or its prompts
    leaves none behind.

    Raises:
        ConfigError: another fit that is alive holds it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = Path(config.output_dir)
    made = [folder for folder in path.parents if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ConfigError(
            f"output_dir {config.output_dir!r} is in use by another fit: wait for it, or name another output_dir"
        ) from None
    try:
        yield
    finally:
        os.close(folder)
        with suppress(OSError):
            for one in (path, *made):
                one.rmdir()


def make_accelerator(config: FitConfig, spread: str | None = None) -> Accelerator:
    """Device, processes, precision and trackers, as `accelerate launch` or `torchrun` set them.

    Args:
        spread: how the base will be, see `train.features.spread`; the heads are whole in any case.

    Raises:
        ConfigError: a tracker that is unknown or not installed, or a way to spread that is not supported.
    """
    _check_trackers(config.report_to)
    if spread is not None and config.features == "cache":
        raise ConfigError(f"features: cache cannot be had with a base spread by {spread}: use --features online")
    handlers = []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.accelerator.is_available():
        # Without these accelerate finds no backend, and every process believes that it is the only one.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        cpu=spread is not None and not torch.accelerator.is_available(),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
        kwargs_handlers=handlers or None,
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ConfigError("ZeRO-3 in a file of DeepSpeed's own is not seen in time: use configs/accelerate/zero3.yaml")
    # The launcher's environment would override the recipe.
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    if plugin is not None:  # DeepSpeed accumulates and clips by its own settings
        settings = plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
        settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
        settings["gradient_clipping"] = config.max_grad_norm
    return accelerator


@contextmanager
def memory_for(task: str, setting: str, value: int, *, then: str) -> Iterator[None]:
    """Raise a ConfigError that says what to lower where a device has no memory left.

    Halving the batch by itself would change what a continued fit sees.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        raise ConfigError(
            f"out of memory while {task}: lower {setting} ({value} now){then}; specbound plan says what fits"
        ) from None


def _check_trackers(names: list[str]) -> None:
    """Accelerate leaves out a known tracker that is not installed without a word."""
    known, installed = (
        sorted(map(str, LOGGER_TYPE_TO_CLASS)),
        [str(name) for name in get_available_trackers()],
    )
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f": expected one of {', '.join(known)}"
            raise ConfigError(f"report_to: {name!r} is unknown{hint}")
        if name not in installed:
            raise ConfigError(f"report_to: {name!r} is not installed; install it, or leave it out")


def show_settings(accelerator: Accelerator, config: FitConfig) -> None:
    """Print every setting that is not a default, and where it came from."""
    for name, source in config.sources.items():
        if source != "default":
            accelerator.print(f"{name} = {getattr(config, name)} ({source})")
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, "
        f"mixed precision {accelerator.mixed_precision}"
    )


def start_trackers(accelerator: Accelerator, config: FitConfig) -> None:
    """Open the trackers and tell them the settings they can hold."""
    if config.report_to:
        plain = {name: value for name, value in asdict(config).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("specbound", config=plain)
