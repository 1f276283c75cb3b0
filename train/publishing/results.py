"""The card's figures as the Hub's evaluation results."""

from typing import Any

from huggingface_hub import EvalResult


def evaluation_results(
    calibrated: dict[str, Any], speed: dict[str, Any] | None, bench: dict[str, Any] | None
) -> list[EvalResult]:
    """Return the figures that `card` is given, as the Hub reads them; names of replayed figures say 'replayed'."""

    def result(kind: str, value: float, name: str, text: str, subset: str | None = None) -> EvalResult:
        # The Hub groups results by type and subset of the data set and ignores its name.
        return EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=text,
            dataset_config=subset,
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(value), 4),
        )

    text = answers(calibrated, "the base's own answers")
    held_out = f"{text}, {calibrated['positions']} tokens kept out of the fit"
    replay = calibrated["replay"]
    results = [
        result("mean_accepted_length", replay["mean_accepted_length"], "mean accepted length, replayed", held_out),
        result("acceptance_rate", replay["acceptance_rate"], "acceptance rate, replayed", held_out),
    ]
    for layer, exit_ in sorted(calibrated["exits"].items(), key=lambda item: int(item[0])):
        results.append(result("agreement", exit_["agreement"], f"agreement with the base, layer {layer}", held_out))
        results.append(result("ece", exit_["ece_after"], f"calibration error, layer {layer}", held_out))
    if bench is not None:
        on = f"{bench['hardware']}, {bench['dtype']}, {bench['threads']} threads, batch 1, greedy"
        for task, methods in {**bench["by_task"], "all": bench["methods"]}.items():
            ours = methods["specbound"]
            where = f"{bench['settings']['prompts']}, {task}, {ours['prompts']} prompts on {on}"
            share = ours["identical_prompts"] / ours["prompts"]
            results.append(result("speedup", ours["speedup_over_stock"], "times stock generate", where, task))
            results.append(result("exact_match", share, "prompts with ids identical to stock generate", where, task))
    elif speed is not None:
        where = f"{speed['prompts']} held-out prompts on {speed['hardware']}, {speed['dtype']}, batch 1, greedy"
        share = speed["identical_prompts"] / speed["prompts"]
        results.append(result("speedup", speed["speedup"], "times stock generate", where, "all"))
        results.append(result("exact_match", share, "prompts with ids identical to stock generate", where, "all"))
    return results


def answers(calibrated: dict[str, Any], own: str) -> str:
    """Say whose answers the text is: the base's own, in these words, or those of the data."""
    share = calibrated.get("corpus", {}).get("greedy_agreement")
    if share is None:
        return own
    return f"given answers ({100 * share:.0f} % of their tokens the base would choose itself)"
