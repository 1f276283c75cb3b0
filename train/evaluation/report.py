"""Statistics of a benchmark's records by method and task, and a table of them in Spec-Bench's layout."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95

Record = dict[str, Any]


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Compute the figures overall (`methods`) and `by_task`, with 95 % bootstrap intervals over prompts."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    names = list(records[0]["runs"]) if records else []
    by_task = {
        task: {name: _figures([one for one in records if one["task"] == task], name) for name in names}
        for task in tasks
    }
    return {"methods": {name: _figures(records, name) for name in names}, "by_task": by_task}


def _figures(records: Sequence[Record], name: str) -> dict[str, Any]:
    """Compute one method's figures. A speed-up is the median over prompts of the ratio of seconds per token."""
    runs = [record["runs"][name] for record in records]
    tokens, seconds = (np.array([run[key] for run in runs], dtype=float) for key in ("tokens", "seconds"))
    low, high = interval(len(runs), lambda chosen: tokens[chosen].sum() / seconds[chosen].sum())
    figures: dict[str, Any] = {
        "tokens_per_second": round(float(tokens.sum() / seconds.sum()), 3),
        "tokens_per_second_interval": [round(low, 3), round(high, 3)],
        "prompts": len(runs),
        "identical_prompts": sum(run["identical"] for run in runs),
        "tokens": int(tokens.sum()),
        "first_token_seconds": round(statistics.median(run["first_token"] for run in runs), 4),
    }
    for other in ("stock", "plain"):
        if other in records[0]["runs"]:
            pairs = [(record["runs"][other], record["runs"][name]) for record in records]
            ratios = np.array([_pace(theirs) / _pace(ours) for theirs, ours in pairs])
            low, high = interval(len(runs), lambda chosen, ratios=ratios: float(np.median(ratios[chosen])))
            figures[f"speedup_over_{other}"] = round(float(np.median(ratios)), 4)
            figures[f"speedup_over_{other}_interval"] = [round(low, 4), round(high, 4)]
            after = [_pace(theirs, prompt=False) / _pace(ours, prompt=False) for theirs, ours in pairs]
            figures[f"speedup_over_{other}_after_the_prompt"] = round(statistics.median(after), 4)
    if "rounds" in runs[0]:
        figures |= _speculation(runs)
    if "peak_memory_mib" in runs[0]:
        figures["peak_memory_mib"] = max(run["peak_memory_mib"] for run in runs)
    return figures


def _speculation(runs: Sequence[Record]) -> dict[str, Any]:
    """Sum what SpecBound's loop counted."""
    drafted, accepted, parts = (_sum(run[key] for run in runs) for key in ("drafted", "accepted", "parts"))
    rounds, tokens = (sum(run[key] for run in runs) for key in ("rounds", "tokens"))
    spent = sum(parts.values())
    return {
        "mean_accepted_length": round((tokens - len(runs)) / rounds, 4) if rounds else 0.0,
        "acceptance_rate": round(accepted.total() / drafted.total(), 4) if drafted else 0.0,
        "exits": {
            str(layer): {"drafted": drafted[layer], "accepted": accepted[layer]} for layer in sorted(drafted, key=int)
        },
        "resting_rounds": sum(run["resting_rounds"] for run in runs),
        "rounds": rounds,
        "time_split": {part: round(seconds / spent, 4) for part, seconds in parts.items()} if spent else {},
    }


def _sum(counts: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Add up counts. Keys become text, as they are in counts read from a JSON file."""
    total: Counter[str] = Counter()
    for one in counts:
        for key, value in one.items():
            total[str(key)] += value
    return total


def _pace(run: Record, *, prompt: bool = True) -> float:
    """Return seconds per token; `prompt=False` leaves out the first, which the prompt's forward gives."""
    if prompt or run["tokens"] < 2:
        return float(run["seconds"] / max(1, run["tokens"]))
    return float((run["seconds"] - run["first_token"]) / (run["tokens"] - 1))


def interval(number: int, statistic: Callable[..., float]) -> tuple[float, float]:
    """Compute a 95 % bootstrap interval of a statistic; it is called with the indices of resampled prompts."""
    generator = np.random.default_rng(0)
    draws = [statistic(generator.integers(number, size=number)) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def markdown(report: dict[str, Any]) -> str:
    """Format a report as a table of speed-ups over stock, one row per method, with the machine and settings."""
    tasks, methods = report["by_task"], report["methods"]
    lines = [
        f"{report['hardware']}, {report['dtype']}, {report['threads']} threads, torch {report['versions']['torch']},"
        f" transformers {report['versions']['transformers']}; {report['settings']['prompts']}, greedy, up to"
        f" {report['settings']['max_new_tokens']} tokens, {methods['stock']['prompts']} prompts. Times stock"
        " `generate`'s speed, medians over prompts; in brackets 95 % intervals.",
        "",
        "| method | " + " | ".join(tasks) + " | overall | tokens/s | accepted length | identical |",
        "|---|" + "---:|" * (len(tasks) + 4),
    ]
    for name, figures in methods.items():
        cells = [f"{tasks[task][name]['speedup_over_stock']:.2f}" for task in tasks]
        low, high = figures["speedup_over_stock_interval"]
        length = f"{figures['mean_accepted_length']:.2f}" if "mean_accepted_length" in figures else ""
        same = f"{figures['identical_prompts']} of {figures['prompts']}"
        same = same if figures["identical_prompts"] == figures["prompts"] else f"**{same}**"
        lines.append(
            f"| {name} | {' | '.join(cells)} | {figures['speedup_over_stock']:.2f} ({low:.2f} to {high:.2f})"
            f" | {figures['tokens_per_second']:.1f} | {length} | {same} |"
        )
    predicted = [name for name, figures in methods.items() if "predicted_speedup" in figures]
    if predicted:
        lines += [
            "",
            "Replay of the same texts with measured costs, beside the run (after the prompt, over stock):",
            "",
            "| method | predicted | measured | accepted length predicted | measured |",
            "|---|---:|---:|---:|---:|",
        ]
    for name in predicted:
        one = methods[name]
        lines.append(
            f"| {name} | {one['predicted_speedup']:.2f} | {one['speedup_over_stock_after_the_prompt']:.2f}"
            f" | {one['predicted_mean_accepted_length']:.2f} | {one['mean_accepted_length']:.2f} |"
        )
    lines += ["", *(f"- `{name}`: {title}" for name, title in report["titles"].items())]
    return "\n".join(lines) + "\n"
