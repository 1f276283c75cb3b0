"""Write the text of the model card, an adapter's README.md, from its measured figures."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from runtime.adapter.config import SpecBoundConfig
from runtime.drafting.policy import SpeculationBounds
from train.evaluation.report import markdown
from train.publishing.results import answers, evaluation_results

TAGS = ["self-speculative-decoding", "speculative-decoding", "early-exit", "custom_generate"]


def card(
    config: SpecBoundConfig,
    calibrated: dict[str, Any],
    speed: dict[str, Any] | None = None,
    bench: dict[str, Any] | None = None,
    *,
    repo_id: str | None = None,
) -> str:
    """Return the text of the card.

    Args:
        config: the adapter's config.
        calibrated: content of `calibration.json`.
        speed: figures of `Comparison.report`, or None.
        bench: a report of `specbound bench`, used instead of `speed`. Without either the card claims no speed.
        repo_id: repository of the adapter; None for an adapter that is not published.
    """
    name = repo_id or "THIS_ADAPTER"
    sections = [
        f"---\n{_metadata(config, calibrated, evaluation_results(calibrated, speed, bench), repo_id)}\n---",
        f"# SpecBound exit heads for {config.base_model_name_or_path}",
        "Exit heads that let the base model draft with its own shallow layers. The output is the base "
        "model's own, token for token; only the speed changes.",
        _use(name, config.base_model_name_or_path),
        "## Speed\n\n" + (_speed(speed) if bench is None else _benched(bench)),
        "## Calibration\n\n" + _exits(calibrated),
        f"Schedule `{config.temperatures.kind}`"
        + (f" with alpha {config.temperatures.alpha:.2f}" if config.temperatures.alpha is not None else "")
        + f", chosen on {_chosen_on(calibrated)}\n\n"
        "![Reliability of each exit before and after calibration](reliability.png)",
        _lookup(calibrated),
        "![Share of right drafts by share of positions drafted at, for each source](precision.png)",
        "## Bounds\n\n" + _bounds(config.bounds),
        _replay(calibrated),
        _ablations(calibrated["ablations"]),
        "![Predicted speed-up by threshold and width](speed.png)\n\n"
        "![Drafted and accepted by source, per 100 tokens](sources.png)",
        f"Draft vocabulary: {config.draft_vocab_size} of "
        f"{config.vocab_size} tokens, {100 * calibrated['held_out_coverage']:.1f} % of held-out text.",
        _provenance(config, calibrated),
        "## Limits\n\nFitted for this base (checked by fingerprint) and text like "
        f"{answers(calibrated, 'its own answers')} to the prompts in `run.yaml`. Other text costs speed, never "
        "correctness. Batches, beam search and other modes run as plain decoding.",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(
    config: SpecBoundConfig, calibrated: dict[str, Any], results: list[EvalResult], repo_id: str | None
) -> str:
    """Return the YAML metadata block that the Hub reads."""
    data = ModelCardData(
        library_name="specbound",
        base_model=config.base_model_name_or_path,
        base_model_relation="adapter",
        pipeline_tag="text-generation",
        tags=TAGS,
        license=config.license,
        datasets=calibrated.get("datasets") or None,
        model_name=repo_id or f"SpecBound exit heads for {config.base_model_name_or_path}",
        eval_results=results,
    )
    return data.to_yaml()


def _use(name: str, base: str) -> str:
    return (
        "```python\nfrom transformers import AutoTokenizer\n\nfrom runtime import load_specbound\n\n"
        f'model = load_specbound("{name}", "{base}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n'
        'inputs = tokenizer("The sky is blue because", return_tensors="pt")\n'
        "output = model.generate(**inputs, max_new_tokens=128)\n"
        "print(tokenizer.decode(output[0]))\nprint(model.specbound.stats)\n```\n\n"
        "`pip install specbound` brings the package, whose modules are named `runtime` and `train`. On a model of "
        "transformers that is loaded already, one call is enough:\n\n"
        f'```python\noutput = model.generate(**inputs, custom_generate="{name}", trust_remote_code=True)\n```'
    )


def _bounds(bounds: SpeculationBounds) -> str:
    own = "".join(f", {tau:g} for layer {layer}" for layer, tau in sorted(bounds.exit_thresholds.items()) if tau <= 1)
    off = [str(layer) for layer, tau in sorted(bounds.exit_thresholds.items()) if tau > 1]
    return (
        f"`exit_threshold` {bounds.exit_threshold:g}{own}"
        + (f"; layers not asked: {', '.join(off)}" if off else "")
        + f"; `max_exit_layer` {bounds.max_exit_layer}, `max_draft_tokens` {bounds.max_draft_tokens}, "
        f"`min_survival` {bounds.min_survival:g}, `min_draft_survival` {bounds.min_draft_survival:g}. "
        "`specbound profile` and `specbound tune` choose for your machine."
    )


def _chosen_on(calibrated: dict[str, Any]) -> str:
    """Say which text temperatures come from, and which the figures; in an adapter of before it is the same."""
    told, bins = f"{calibrated['positions']} tokens of {calibrated['sequences']}", "ECE over 15 bins of equal mass"
    if (fitted_on := calibrated.get("fitted_on")) is None:
        return f"{told} texts kept out of the fit; {bins}, on the same text."
    return (
        f"{fitted_on['positions']} tokens of {fitted_on['sequences']} texts kept out of the fit. All figures are of "
        f"{told} other texts, on which nothing was chosen, at the temperatures of the table; {bins}."
    )


def _replay(calibrated: dict[str, Any]) -> str:
    replayed = calibrated["replay"]
    text = "these texts" if "fitted_on" in calibrated else "the logged calibration text"
    text = calibrated.get("tuned", {}).get("replayed_on", text)
    costs, (low, high) = replayed["costs"], replayed["predicted_speedup_interval"]
    where = costs if isinstance(costs, str) else ", ".join(f"{name} {value}" for name, value in sorted(costs.items()))
    return (
        f"Replay of {text} with them: mean accepted length "
        f"{replayed['mean_accepted_length']:.2f}, acceptance rate {replayed['acceptance_rate']:.2f}, predicted "
        f"{replayed['predicted_speedup']:.2f}x stock `generate` ({low:.2f} to {high:.2f} over texts; costs: {where})."
    )


def _ablations(ablations: dict[str, Any]) -> str:
    rows = [
        "| replayed | mean accepted length | acceptance rate | layer passes a token | predicted speed-up |",
        "|---|---:|---:|---:|---:|",
    ]
    rows += [
        f"| {name} | {figures['mean_accepted_length']:.2f} | {figures['acceptance_rate']:.2f} "
        f"| {figures['layer_passes_per_token']:.1f} | {figures['predicted_speedup']:.2f}x |"
        for name, figures in ablations.items()
    ]
    return "\n".join(rows)


def _provenance(config: SpecBoundConfig, calibrated: dict[str, Any]) -> str:
    agreement = calibrated.get("agreement")
    return (
        "## Exactness and provenance\n\nThe ids are those of `generate` of the base alone, on the same device, dtype, "
        "threads and versions; which bits allow that is probed where it is loaded (`model.specbound.certificate`). "
        f"Base: `{config.base_model_name_or_path}` at revision `{config.base_model_revision or 'not stated'}`, "
        f"fingerprint `{config.base_model_fingerprint}`. Settings and versions of the fit: `run.yaml`; all figures: "
        "`calibration.json`."
        + (
            f" On the same {agreement['tokens']} tokens the runtime accepted {agreement['by_run']:.2f} tokens a round "
            f"and replay predicted {agreement['by_replay']:.2f}."
            if agreement
            else ""
        )
    )


def _risk(layer: str, risk: dict[str, Any]) -> str:
    if risk["threshold"] is None:
        return f"layer {layer}: none"
    return f"layer {layer}: {risk['threshold']:g}"


def _lookup(calibrated: dict[str, Any]) -> str:
    lookup = calibrated.get("lookup")
    if lookup is None:
        return "The depth-0 exit, a lookup of the longest suffix seen before, is off."
    return (
        "Depth 0, a lookup of the longest suffix seen before, costs no layer: it proposes a token at "
        f"{100 * lookup['proposed']:.0f} % of positions, {100 * lookup['precision']:.0f} % of them right, ECE "
        f"{lookup['ece']:.3f}" + ("." if "fitted_on" in calibrated else " on the text its table was fitted on.")
    )


def _exits(calibrated: dict[str, Any]) -> str:
    rows = [
        "| exit after layer | temperature | agreement | ECE at T = 1 | ECE calibrated | precision / coverage at 0.8 |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for layer, exit_ in sorted(calibrated["exits"].items(), key=lambda item: int(item[0])):
        at = next(point for point in exit_["thresholds"] if point["threshold"] == 0.8)
        precision = "-" if at["precision"] is None else f"{at['precision']:.2f}"
        rows.append(
            f"| {layer} | {exit_['temperature']:.2f} | {exit_['agreement']:.3f} | {exit_['ece_before']:.3f} "
            f"| {exit_['ece_after']:.3f} | {precision} / {at['coverage']:.2f} |"
        )
    risks = [
        (layer, exit_["risk"]) for layer, exit_ in sorted(calibrated["exits"].items(), key=lambda item: int(item[0]))
    ]
    epsilon, delta = risks[0][1]["epsilon"], risks[0][1]["delta"]
    return (
        "\n".join(rows) + f"\n\nLowest thresholds at which, with {100 * (1 - delta):.0f} % confidence, at most "
        f"{100 * epsilon:.0f} % of an exit's drafts on new text of this kind are rejected: "
        + "; ".join(_risk(*pair) for pair in risks)
        + ". A bound on wasted work; what comes out is the base's either way."
    )


def _benched(bench: dict[str, Any]) -> str:
    ours = bench["methods"]["specbound"]
    low, high = ours["speedup_over_stock_interval"]
    return (
        f"{ours['speedup_over_stock']:.2f} times stock `generate` ({low:.2f} to {high:.2f}), "
        f"{ours['identical_prompts']} of {ours['prompts']} prompts with identical ids. All methods in turn in one "
        "process, by `specbound bench`; by task:\n\n" + markdown(bench).rstrip()
    )


def _speed(speed: dict[str, Any] | None) -> str:
    if speed is None:
        return "Not measured yet on any machine."
    return (
        f"{speed['speedup']:.2f}x stock `generate` ({speed['specbound_tokens_per_second']:.1f} against "
        f"{speed['stock_tokens_per_second']:.1f} tokens/s), "
        f"{speed['identical_prompts']} of {speed['prompts']} prompts with identical ids, "
        f"mean accepted length {speed['mean_accepted_length']:.2f}, "
        f"acceptance rate {speed['acceptance_rate']:.2f}. "
        f"{speed['hardware']}, {speed['dtype']}, {speed['threads']} threads, batch 1, "
        f"greedy, {speed['tokens']} tokens."
    )
