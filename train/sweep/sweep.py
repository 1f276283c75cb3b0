"""A sweep: fits of a recipe with varied settings on one corpus, one after the other, until there are enough trials."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from runtime.adapter.identity import file_sha256
from runtime.base import base_config, find_base
from runtime.errors import ConfigError, SpecBoundError
from runtime.files import write_atomic
from train.fitting.interrupts import StopSignals
from train.replay.costs import CostTable
from train.replay.search import Held
from train.settings.fit_config import parse_config, validate, validate_against_model
from train.sweep.results import Results, shown
from train.sweep.space import Space
from train.sweep.study import Study, Taken
from train.sweep.trial import FIGURES, RECIPE, judge, run_module, tidy, write_recipe

FAILED_FIRST = 3  # so many failures before any success end a sweep: the fault is not in the settings that vary


class Sweep:
    """A sweep of a recipe, in a folder that several processes may share.

    Args:
        recipe: a file as `--config` of a fit takes it.
        space: a file of what varies, see `Space.read`.
        costs: a cost table of `specbound profile`; None counts no time and asks for the longest accepted drafts.
        folder: of the sweep; by default `sweep` in the recipe's output folder.

    Raises:
        SpecBoundError: recipe, space, costs or folder cannot be used.
    """

    def __init__(self, recipe: Path, space: Path, costs: Path | None, folder: Path | None) -> None:
        self.config = parse_config(["--config", str(recipe)])
        validate(self.config)
        self.space = Space.read(space, self.config)
        self.costs = None if costs is None else CostTable.read(costs)
        self.objective = "mean_accepted_length" if costs is None else "predicted_speedup"
        self.folder = folder or Path(self.config.output_dir) / "sweep"
        self._check_against_model(space)
        settings = asdict(self.config)
        del settings["sources"]
        settings |= {"space": {name: repr(one) for name, one in self.space.distributions.items()}}
        settings |= {"costs": None if costs is None else file_sha256(costs), "judged_on": "calibration"}
        self.study = Study(self.folder, self.space, settings, self.config.seed)

    def run(self, number: int) -> Results:
        """Run trials until there are `number`, those of other processes included; the figures of all.

        Raises:
            SpecBoundError: no trial came to an end.
            SystemExit: after Ctrl-C or SIGTERM, or where no corpus could be made; the same call goes on.
        """
        self.study.begin(self.space.params_of(self.config), number)
        results, has_corpus = self.results(), False
        with StopSignals() as stop:
            while (taken := self.study.next(number)) is not None:
                try:
                    if not has_corpus:
                        self._make_corpus(stop)
                        has_corpus = True
                    self._run(taken, number, results, stop)
                finally:
                    taken.held.release()
                results = self.results()
                if not results.trials and len(results.failed) >= FAILED_FIRST:
                    break
        if not results.trials:
            raise SpecBoundError(f"no trial came to an end, {len(results.failed)} failed: what they said is above")
        with self.study.lock:  # since processes that share the folder write the same files
            results = self.results()
            results.write(self.folder, self.config)
        return results

    def results(self) -> Results:
        """What all trials gave so far."""
        return Results.of(self.study, self.objective, None if self.costs is None else dict(self.costs.conditions))

    def _check_against_model(self, space: Path) -> None:
        """Every value must suit the base's depth and vocabulary, the costs its depth."""
        base = find_base(self.config.model_name_or_path)
        config = base_config(base, {"revision": self.config.model_revision})
        if config is None:  # of a base with an adapter of PEFT's only its fits will tell
            return
        shape = config.get_text_config()
        sizes = {"num_hidden_layers": shape.num_hidden_layers, "vocab_size": shape.vocab_size}
        try:
            for settings in self.space.ends():
                validate_against_model(replace(self.config, **settings), **sizes)
        except ConfigError as error:
            raise ConfigError(f"{space}: {error}") from None
        if self.costs is not None:
            self.costs.check_layers(shape.num_hidden_layers, base)

    def _make_corpus(self, stop: StopSignals) -> None:
        """Make the corpus that all trials share, or see that it is there; another process may be at it."""
        recipe = self.folder / RECIPE
        with FileLock(self.folder / "corpus.lock"):
            write_recipe(recipe, self.config, self._shared(), comment="What all trials share.")
            if code := run_module("train.distil", recipe, stop):
                raise SystemExit(code)  # it has said why

    def _shared(self) -> dict[str, Any]:
        """Settings of all trials; features are computed once for those that have the same exits."""
        shared = {"corpus_dir": str(self.config.corpus_path), "features_dir": str(self.folder / "features")}
        return shared | {"features": "cache", "push_to_hub": False}

    def _run(self, taken: Taken, number: int, results: Results, stop: StopSignals) -> None:
        """Fit a trial, judge it, and bring the files of the sweep up to date."""
        settings, recipe = self.space.settings(taken.params), taken.folder / RECIPE
        best = f"; best so far {results.said(results.trials[0])}" if results.trials else ""
        print(f"trial {taken.number}, {len(self.study.trials)} of {number}: {_words(settings)}{best}", flush=True)
        changes = settings | self._shared() | {"output_dir": str(taken.folder)}
        write_recipe(recipe, self.config, changes, comment=f"Trial {taken.number} of a sweep.")
        started = time.monotonic()
        code = run_module("train.fit_exits", recipe, stop, "--resume_from_checkpoint", "latest")
        if code:
            print(f"trial {taken.number} failed with exit code {code}", flush=True)
            self.study.tell(taken, None)
            return
        config = self.config
        held = Held(config.exit_threshold, config.max_exit_layer, config.max_draft_tokens)
        figures = judge(taken.folder, self.costs, held) | {"seconds": round(time.monotonic() - started, 1)}
        write_atomic(taken.folder / FIGURES, (json.dumps(figures, indent=2) + "\n").encode())
        tidy(taken.folder)
        self.study.tell(taken, figures[self.objective])
        print(f"trial {taken.number}: {results.said(figures)}", flush=True)
        with self.study.lock:
            self.results().write(self.folder, config)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in settings.items())
