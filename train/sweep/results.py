"""`Results`: what the trials of a sweep gave, best first, as table, JSON, picture and recipe of the best."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from runtime.files import write_atomic
from train.settings.fit_config import FitConfig
from train.sweep.picture import picture
from train.sweep.study import Study
from train.sweep.trial import FIGURES, write_recipe

TABLE, JSON, PICTURE, BEST = "sweep.md", "sweep.json", "sweep.png", "best.yaml"
MEANING = {
    "predicted_speedup": "predicted times the speed of stock generate",
    "mean_accepted_length": "predicted tokens per verify pass",
}


@dataclass(frozen=True, slots=True)
class Results:
    """Trials that came to an end.

    Attributes:
        objective: the figure that decides, a name of `MEANING`.
        costs: conditions of the cost table; None where costs were counted in layers.
        trials: best first: `number`, `settings` that varied, figures and `seconds`.
        failed: numbers of trials whose fit failed.
    """

    objective: str
    costs: dict[str, Any] | None
    trials: list[dict[str, Any]]
    failed: list[int]

    @classmethod
    def of(cls, study: Study, objective: str, costs: dict[str, Any] | None) -> "Results":
        """Read them from a sweep's folder."""
        trials, failed = [], []
        for one in study.trials:
            if one.state == TrialState.COMPLETE:
                figures = json.loads((study.folder / f"trial-{one.number:03d}" / FIGURES).read_text(encoding="utf-8"))
                trials.append({"number": one.number, "settings": study.space.settings(one.params), **figures})
            elif one.state == TrialState.FAIL:
                failed.append(one.number)
        trials.sort(key=lambda trial: (-trial[objective], trial["number"]))
        return cls(objective, costs, trials, failed)

    def write(self, folder: Path, config: FitConfig) -> None:
        """Write `sweep.md`, `sweep.json`, `sweep.png` and `best.yaml`; needs a trial.

        Args:
            config: the recipe that was varied.
        """
        best = self.trials[0]
        fields = {name: getattr(self, name) for name in self.__slots__}
        write_atomic(folder / JSON, (json.dumps(fields, indent=2) + "\n").encode())
        write_atomic(folder / TABLE, (self.table() + "\n").encode())
        picture(self.trials, self.objective, MEANING[self.objective], folder / PICTURE)
        write_recipe(
            folder / BEST,
            config,
            best["settings"] | {"corpus_dir": str(config.corpus_path), "output_dir": str(folder / "best")},
            comment=f"Trial {best['number']}, the best of {len(self.trials)}: {self.said(best)}.",
        )

    def said(self, trial: dict[str, Any]) -> str:
        """A trial's figure in words."""
        return f"{trial[self.objective]:.3f} {MEANING[self.objective]}"

    def table(self, number: int | None = None) -> str:
        """As markdown, best first; `number` rows at most."""
        names = list(self.trials[0]["settings"])
        head = ["trial", "speed-up", "95 % of texts", "accepted length", *names, "minutes"]
        rows = [head, ["---"] * len(head)]
        for trial in self.trials[:number]:
            low, high = trial["predicted_speedup_interval"]
            figures = [f"{trial['predicted_speedup']:.3f}", f"{low:.2f} to {high:.2f}"]
            figures.append(f"{trial['mean_accepted_length']:.3f}")
            settings = [shown(trial["settings"][name]) for name in names]
            rows.append([str(trial["number"]), *figures, *settings, f"{trial['seconds'] / 60:.1f}"])
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        failed = f"; failed: {', '.join(map(str, self.failed))}" if self.failed else ""
        costs = "counted in layers" if self.costs is None else "of " + str(self.costs.get("hardware", "this machine"))
        return "\n".join([f"Best first by {MEANING[self.objective]}, costs {costs}{failed}.", "", *lines])


def shown(value: Any) -> str:
    """A value in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)
