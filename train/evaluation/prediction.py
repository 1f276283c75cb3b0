"""Predictions of replay for the texts of a benchmark, to compare with the measured speeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from train.evaluation.methods import Method
from train.replay.costs import CostTable
from train.replay.replay import Replayer
from train.replay.workload import log_texts


def predict(
    model: Any,
    methods: dict[str, Method],
    prompts: Sequence[Tensor],
    records: Sequence[dict[str, Any]],
    costs: CostTable,
    report: dict[str, Any],
) -> None:
    """Add `predicted_mean_accepted_length` and `predicted_speedup` to the methods that draft with the adapter.

    The predicted speed-up over stock is the median over texts and leaves out the prompt's forward. It assumes that the
    controller never pauses speculation.

    Args:
        prompts: token ids of each record's prompt, of shape [1, T]; there are more if the run was interrupted.
        report: the benchmark's report, which is changed in place.
    """
    rows = [(ids[0].tolist(), record["response"]) for ids, record in zip(prompts, records, strict=False)]
    traces = log_texts(model, rows)
    tasks = np.array([record["task"] for record in records])
    groups = {"": np.ones(len(records), dtype=bool)} | {task: tasks == task for task in report["by_task"]}
    for task, chosen in groups.items():
        figures = report["by_task"][task] if task else report["methods"]
        replayer = Replayer(traces.of_sequences(chosen), costs)
        for name, method in methods.items():
            if method.bounds is not None and method.drafter is model.specbound.drafter:
                replayed = replayer.run(method.bounds)
                some = replayed.ms_by_text > 0
                ratios = replayed.plain_by_text[some] / replayed.ms_by_text[some]
                figures[name]["predicted_mean_accepted_length"] = round(replayed.mean_accepted_length, 4)
                figures[name]["predicted_speedup"] = round(float(np.median(ratios)), 4)
