"""`Study`: the trials of a sweep in a folder that several processes may share. Knows no fit and no figures.

Optuna keeps them in a journal, a file that is only added to. A trial that is under way is held by its process through
a lock, which goes with the process; whoever comes next takes up a trial that nobody holds.
"""

import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from runtime.errors import ConfigError
from runtime.files import growing
from train.sweep.space import Space

JOURNAL, LOCK = "study.log", "study.lock"
ASKS = 50  # proposals in a row that repeat an earlier trial, after which there is nothing new


@dataclass(frozen=True, slots=True)
class Taken:
    """A trial that this process is to run.

    Attributes:
        number: from 0 on.
        params: Optuna's parameters.
        folder: its own.
        held: the lock that says so, to be released.
    """

    number: int
    params: dict[str, Any]
    folder: Path
    held: FileLock


class Study:
    """The study of a sweep's folder.

    Args:
        folder: created if absent.
        settings: all that the figures depend on besides the varied settings, as JSON values.
        seed: of the search.

    Attributes:
        lock: to be held while files of the folder are written.

    Raises:
        ConfigError: the folder holds a sweep of other settings.
    """

    def __init__(self, folder: Path, space: Space, settings: Mapping[str, Any], seed: int) -> None:
        self.folder, self.space, self.seed = folder, space, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / LOCK)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self.lock:
            storage = JournalStorage(_Journal(folder / JOURNAL))
            self.study = optuna.create_study(
                storage=storage, study_name="sweep", direction="maximize", load_if_exists=True
            )
            before = self.study.user_attrs.get("settings")
            if before is None:
                self.study.set_user_attr("settings", dict(settings))
            elif before != settings:
                other = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
                raise ConfigError(
                    f"{folder} holds a sweep with other {', '.join(other)}: go on as it was begun, or give another"
                    " --output"
                )

    @property
    def trials(self) -> list[FrozenTrial]:
        """Those that were begun, without proposals that repeated one."""
        begun = self.study.get_trials(deepcopy=False)
        return [one for one in begun if one.state != TrialState.WAITING and "repeats" not in one.user_attrs]

    def begin(self, first: dict[str, Any] | None, number: int) -> None:
        """Put trials at the head of the queue, unless they are there already: `first`, and all where they are few.

        Args:
            first: parameters of the first trial.
            number: trials in all.
        """
        few = self.space.combinations() if self.space.num_combinations <= number else []
        with self.lock:
            for params in [first, *few]:
                if params is not None:
                    self.study.enqueue_trial(params, skip_if_exists=True)

    def next(self, number: int) -> Taken | None:
        """Take a trial up that nobody holds, or ask for a new one; None where `number` are there or nothing is new."""
        with self.lock:
            for one in self.trials:
                if one.state == TrialState.RUNNING and (taken := self._take(one.number, one.params)) is not None:
                    if set(taken.params) == set(self.space.distributions):
                        return taken
                    self.tell(taken, None)  # cut off while it was made
                    taken.held.release()
            for _ in range(ASKS):
                done = [one.params for one in self.trials]
                if len(done) >= number:
                    return None
                # With a seed of its own each, since processes must not propose the same.
                seed = (self.seed + len(self.study.get_trials(deepcopy=False))) % 2**32
                self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
                asked = self.study.ask(self.space.distributions)
                if asked.params not in done:
                    return self._take(asked.number, asked.params)
                asked.set_user_attr("repeats", True)
                self.study.tell(asked, state=TrialState.FAIL)
        return None

    def tell(self, taken: Taken, value: float | None) -> None:
        """Say what came of a trial, None where it failed."""
        with self.lock:
            if value is None:
                self.study.tell(taken.number, state=TrialState.FAIL)
            else:
                self.study.tell(taken.number, value)

    def _take(self, number: int, params: dict[str, Any]) -> Taken | None:
        """Hold a trial; None where another process does."""
        folder = self.folder / f"trial-{number:03d}"
        folder.mkdir(exist_ok=True)
        held = FileLock(folder / "held.lock")
        try:
            held.acquire(timeout=0)
        except Timeout:
            return None
        if _is_fitting(folder):
            held.release()
            return None
        return Taken(number, params, folder, held)


class _Journal(JournalFileBackend):
    """Optuna's journal, in which no half line stays where a disk is full: nothing behind one can be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines, all of them or none. Only whoever holds the study's lock does."""
        with growing(self.path):
            super().append_logs(logs)


def _is_fitting(folder: Path) -> bool:
    """Whether a fit that outlived its sweep still holds its output folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
