"""What a card says of calibration and of the bounds, as markdown; and a fit's end in two lines."""

from collections.abc import Mapping
from typing import Any

from runtime.adapter.config import SpecBoundConfig
from train.replay.sources import idle

# Rows of the card's table, by the names of `train.replay.variants`.
VARIANTS = {
    "as chosen": "with the bounds as chosen",
    "T = 1 at every exit": "confidences not calibrated (T = 1)",
    "no depth bound": "every exit asked",
    "no width bound": "up to 16 drafts a round",
    "no survival stop": "drafts made however unlikely they are",
    "heads alone": "heads without the lookup",
    "lookup alone": "lookup without the heads",
}
# Bounds with a whole number or a share, and what they mean.
MEANING = {
    "max_exit_layer": "the deepest exit that is asked",
    "max_draft_tokens": "the most drafts in a round",
    "max_depth": "the most drafts on one path",
    "max_branches": "the most drafts that may follow one token",
    "sure_threshold": "a source this confident is the last that is asked at a token",
    "min_survival": "no head is asked behind drafts whose chance of being accepted is lower",
    "min_draft_survival": "drafts whose chance of being accepted is lower are not made",
}


def calibration(config: SpecBoundConfig, calibrated: dict[str, Any]) -> str:
    """How well confidences tell what is right: a table of the exits, what it is of, and the lookup."""
    kind, alpha = config.temperatures.kind, config.temperatures.alpha
    schedule = f"`{kind}`" + (f" (alpha {alpha:.2f})" if alpha is not None else "")
    return "\n\n".join(
        [
            "An exit's confidence is the probability that it gives its draft, at a temperature that was fitted so "
            "that confidences are true: of drafts with confidence 0.8, about 80 % should be right. Bounds rely on it.",
            _exits(calibrated),
            "- Agreement: how often the exit's first choice is the base's.\n"
            "- ECE, the expected calibration error: how far confidence and share of right drafts lie apart on "
            "average, over 15 bins of equal size. 0 is perfect; as a rule of thumb up to 0.02 is good, and above 0.05 "
            "drafts end noticeably too early or too late, which costs time, never a token.\n"
            "- Precision and coverage at 0.8: of the drafts at least that confident, the share that is right; and the "
            "share of all positions that have such a draft.",
            _risks(calibrated),
            f"Temperatures follow the schedule {schedule}. {_chosen_on(calibrated)}",
            "![Reliability of each exit before and after calibration](reliability.png)",
            _lookup(calibrated),
            "![Share of right drafts by share of positions drafted at, for each source](precision.png)",
        ]
    )


def drafting(config: SpecBoundConfig, calibrated: dict[str, Any]) -> str:
    """Which sources draft under which bounds, and what replay predicts with them and without each part."""
    replayed = calibrated["replay"]
    low, high = replayed["predicted_speedup_interval"]
    text = "text kept out of the fit" if "fitted_on" in calibrated else "the calibration text"
    text = calibrated.get("tuned", {}).get("replayed_on", text)
    return "\n\n".join(
        [
            "Bounds say when to draft and when to stop. Those of this adapter, chosen by replay "
            f"{_where(replayed['costs'])}; `specbound profile` and `specbound tune` choose them for your machine:",
            _bounds(config),
            f"Replay of {text} with them predicts {replayed['predicted_speedup']:.2f} times the speed of stock "
            f"`generate` ({low:.2f} to {high:.2f} over texts), {replayed['mean_accepted_length']:.2f} tokens a round "
            f"and {100 * replayed['acceptance_rate']:.0f} % of drafts accepted.",
            *_sources(calibrated),
            "What each part is worth, on the same text. A round is one verification by the whole base, and gives at "
            f"least one token; without drafts every token takes {config.num_hidden_layers} layers.",
            _ablations(calibrated["ablations"]),
            "![Predicted speed-up by threshold and width](speed.png)\n\n"
            "![Drafted and accepted by source, per 100 tokens](sources.png)",
            f"The heads can draft {config.draft_vocab_size:,} of the base's {config.vocab_size:,} tokens, "
            f"{100 * calibrated['held_out_coverage']:.1f} % of held-out text.",
        ]
    )


def summary(calibrated: dict[str, Any]) -> str:
    """The end of a fit: what replay predicts, and which sources draft."""
    replayed = calibrated["replay"]
    return (
        f"predicted {_where(replayed['costs'])}: {replayed['predicted_speedup']:.2f}x stock generate, mean accepted "
        f"length {replayed['mean_accepted_length']:.2f}\n{sources_line(calibrated['sources'], replayed['costs'])}"
    )


def sources_line(worth: Mapping[str, str], costs: Any) -> str:
    """Which sources draft and what each is worth, and a warning where no head does."""
    line = "drafts: " + "; ".join(f"{name} {said}" for name, said in worth.items())
    return line + (f"\nwarning: {none}" if (none := idle(worth, costs)) else "")


def number_of(texts: int) -> str:
    """So many texts, in words."""
    return f"{texts:,} text" + ("" if texts == 1 else "s")


def _where(costs: Any) -> str:
    """What costs a prediction is by, in words."""
    if isinstance(costs, str):
        return "with costs counted in layers, not measured"
    where = ", ".join(str(costs[name]) for name in ("hardware", "dtype") if name in costs)
    threads = f", {costs['threads']} threads" if costs.get("threads") else ""
    versions = f" ({costs['versions']})" if costs.get("versions") else ""
    return f"with costs measured on {where}{threads}{versions}"


def _bounds(config: SpecBoundConfig) -> str:
    """A table of what a round may do; settings that change nothing are left out."""
    bounds = config.bounds
    own = sorted(bounds.exit_thresholds.items())
    named = [f"{tau:g} for {_source(layer)}" for layer, tau in own if tau <= 1]
    named += [f"never for {_source(layer)}" for layer, tau in own if tau > 1]
    common = f"{bounds.exit_threshold:g}" if bounds.exit_threshold <= 1 else "never"
    all_own = {*config.exit_layers, *([0] if config.lookup else [])} <= set(bounds.exit_thresholds)
    told = "; otherwise ".join([", ".join(named)] * bool(named) + [common] * (not all_own))
    rows = ["| bound | value | meaning |", "|---|---:|---|"]
    rows.append(f"| `exit_threshold` | {told} | the confidence from which a source drafts |")
    neutral = {"max_branches": 1, "max_depth": None, "sure_threshold": 0, "min_survival": 0, "min_draft_survival": 0}
    for name, meaning in MEANING.items():
        value = getattr(bounds, name)
        if name not in neutral or value != neutral[name]:
            rows.append(f"| `{name}` | {value:g} | {meaning} |")
    return "\n".join(rows)


def _source(layer: int) -> str:
    return f"layer {layer}" if layer else "the lookup"


def _sources(calibrated: dict[str, Any]) -> list[str]:
    """What each source is worth; nothing in an adapter of before."""
    worth = calibrated.get("sources") or calibrated.get("tuned", {}).get("sources")
    if worth is None:
        return []
    lines = ["Drafts come from these sources (predicted speed with each and without it):"]
    lines.append("\n".join(f"- {name}: {said}" for name, said in worth.items()))
    return lines + ([f"**{none}.**"] if (none := idle(worth, calibrated["replay"]["costs"])) else [])


def _ablations(ablations: dict[str, Any]) -> str:
    rows = [
        "| replayed | tokens a round | drafts accepted | layers run a token | predicted speed-up |",
        "|---|---:|---:|---:|---:|",
    ]
    rows += [
        f"| {VARIANTS.get(name, name)} | {figures['mean_accepted_length']:.2f} "
        f"| {100 * figures['acceptance_rate']:.0f} % | {figures['layer_passes_per_token']:.1f} "
        f"| {figures['predicted_speedup']:.2f}x |"
        for name, figures in ablations.items()
    ]
    return "\n".join(rows)


def _chosen_on(calibrated: dict[str, Any]) -> str:
    """Say which text temperatures come from, and which the figures; in an adapter of before it is the same."""
    told = f"{calibrated['positions']:,} tokens of {number_of(calibrated['sequences'])}"
    if (fitted_on := calibrated.get("fitted_on")) is None:
        return f"They were fitted on {told} kept out of the fit, and all figures are of the same text."
    what = "Temperatures" if "replayed_on" in calibrated.get("tuned", {}) else "Temperatures and bounds"
    return (
        f"{what} come from {fitted_on['positions']:,} tokens of {number_of(fitted_on['sequences'])} "
        f"kept out of the fit. The figures are of {told} that are neither among those nor among the texts of the "
        "fit, and on which this fit chose nothing."
    )


def _risks(calibrated: dict[str, Any]) -> str:
    """From which confidence on an exit's drafts are mostly accepted, with a guarantee."""
    exits = sorted(calibrated["exits"].items(), key=lambda item: int(item[0]))
    epsilon, delta = exits[0][1]["risk"]["epsilon"], exits[0][1]["risk"]["delta"]
    found = [(layer, exit_["risk"]["threshold"]) for layer, exit_ in exits]
    told = [
        f"{tau:g} at layer {layer}" if tau is not None else f"no threshold at layer {layer}" for layer, tau in found
    ]
    return (
        f"Lowest confidence from which, with {100 * (1 - delta):.0f} % certainty, at most {100 * epsilon:.0f} % of "
        f"the drafts on new text of this kind are rejected: {', '.join(told)}. A rejected draft costs time; the "
        "output is the base's own either way."
    )


def _lookup(calibrated: dict[str, Any]) -> str:
    lookup = calibrated.get("lookup")
    if lookup is None:
        return "The lookup, which repeats what followed the same words before, is off."
    return (
        "Besides the heads there is a lookup, which repeats what followed the same words earlier in the text and "
        f"costs no layer. It has a draft at {100 * lookup['proposed']:.0f} % of positions, of which "
        f"{100 * lookup['precision']:.0f} % are right; its ECE is {lookup['ece']:.3f}"
        + ("." if "fitted_on" in calibrated else " on the text its table was fitted on.")
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
    return "\n".join(rows)
