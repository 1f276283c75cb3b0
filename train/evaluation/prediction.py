"""What replay predicts for the very texts of a benchmark, beside what was measured there. Knows no clocks."""

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

    The speed-up is the median over texts, over stock, after the prompt; a controller's rests are not foreseen.

    Args:
        prompts: token ids of each record's prompt, [1, T]; more of them where the run was cut short.
        report: the benchmark's figures, overall and by task.
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
