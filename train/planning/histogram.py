"""A picture of how long prompts and answers are."""

from functools import partial
from pathlib import Path

import matplotlib

from runtime.files import write_atomic
from train.corpus.options import CorpusOptions
from train.planning.survey import Survey

matplotlib.use("agg")
from matplotlib import pyplot as plt

BINS = 40


def histogram(survey: Survey, options: CorpusOptions, path: Path) -> None:
    """Draw lengths in tokens, a panel for prompts and one for answers if there are any; a line at what is cut."""
    parts = [("prompts", survey.prompts, options.max_prompt_tokens, "skipped above")]
    parts += [("given answers", survey.answers, options.max_new_tokens, "cut above")] if survey.answers else []
    figure, panels = plt.subplots(1, len(parts), figsize=(4.6 * len(parts), 3.2), squeeze=False)
    for panel, (name, lengths, limit, said) in zip(panels[0], parts, strict=True):
        panel.hist(lengths, bins=BINS, color="tab:blue")
        if limit <= 2 * max(lengths, default=0):
            panel.axvline(limit, color="tab:orange", linewidth=1, label=f"{said} {limit}")
            panel.legend(fontsize=8, frameon=False)
        panel.set(xlabel=f"tokens of {name}", ylabel="turns")
    figure.tight_layout()
    write_atomic(path, partial(figure.savefig, format=path.suffix[1:] or "png", dpi=120, metadata={"Software": None}))
    plt.close(figure)
