"""Write the text of the model card, an adapter's README.md, from its measured figures."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from runtime.adapter.config import SpecBoundConfig
from train.evaluation.report import markdown
from train.publishing.evidence import calibration, drafting
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
    base = config.base_model_name_or_path
    sections = [
        f"---\n{_metadata(config, calibrated, evaluation_results(calibrated, speed, bench), repo_id)}\n---",
        f"# SpecBound exit heads for {base}",
        "Small heads for the first layers of this base model. They guess the next few tokens early, and the whole "
        "model checks all guesses in one pass, so text comes faster. The output is the base model's own, token for "
        "token.",
        _use(name, base),
        "## Speed\n\n" + (_speed(speed, calibrated["replay"]) if bench is None else _benched(bench)),
        "## Where drafts come from\n\n" + drafting(config, calibrated),
        "## Calibration\n\n" + calibration(config, calibrated),
        _provenance(config, calibrated),
        "## Limits\n\nThe heads are for this base, which is checked where they are loaded, and for text like "
        f"{answers(calibrated, 'its own answers')} to the prompts in `run.yaml`. On other text they save less time; "
        "the output is the base's all the same. `generate` drafts for one prompt at a time; for several use "
        "`model.generate_batch` or `specbound serve`. A batch given to `generate`, beam search and other modes run as "
        "plain decoding, with a warning.",
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


def _provenance(config: SpecBoundConfig, calibrated: dict[str, Any]) -> str:
    agreement, revision = calibrated.get("agreement"), config.base_model_revision
    which = f"at revision `{revision}`" if revision else "(its revision was not recorded)"
    same = (
        f" As a check the runtime decoded {agreement['tokens']:,} tokens of the same text: {agreement['by_run']:.2f} "
        f"tokens a round, where replay predicted {agreement['by_replay']:.2f}."
        if agreement
        else ""
    )
    return (
        "## Exactness and provenance\n\nThe token ids are those that `generate` of the base alone gives on the same "
        "device, in the same dtype, with the same threads and versions. Whether a machine allows that is tested where "
        "the adapter is loaded; `model.specbound.certificate` tells the result.\n\n"
        f"Base: `{config.base_model_name_or_path}` {which}, fingerprint `{config.base_model_fingerprint}`. Settings "
        f"and versions of the fit are in `run.yaml`, all figures in `calibration.json`.{same}"
    )


def _benched(bench: dict[str, Any]) -> str:
    ours = bench["methods"]["specbound"]
    low, high = ours["speedup_over_stock_interval"]
    return (
        f"{ours['speedup_over_stock']:.2f} times the speed of stock `generate` ({low:.2f} to {high:.2f}), "
        f"{ours['identical_prompts']} of {ours['prompts']} prompts with identical ids. All methods in turn in one "
        "process, by `specbound bench`; by task:\n\n" + markdown(bench).rstrip()
    )


def _speed(speed: dict[str, Any] | None, replayed: dict[str, Any]) -> str:
    if speed is None:
        return "Not measured yet on any machine; what replay predicts is below."
    return (
        "| | predicted by replay | measured |\n|---|---:|---:|\n"
        f"| times stock `generate` | {replayed['predicted_speedup']:.2f} | {speed['speedup']:.2f} |\n"
        f"| tokens a round | {replayed['mean_accepted_length']:.2f} | {speed['mean_accepted_length']:.2f} |\n"
        f"| drafts accepted | {100 * replayed['acceptance_rate']:.0f} % | {100 * speed['acceptance_rate']:.0f} % |\n\n"
        f"Measured: {speed['specbound_tokens_per_second']:.1f} tokens/s against "
        f"{speed['stock_tokens_per_second']:.1f} of stock `generate`; {speed['identical_prompts']} of "
        f"{speed['prompts']} prompts with identical ids. {speed['hardware']}, {speed['dtype']}, {speed['threads']} "
        f"threads, one prompt at a time, greedy, {speed['tokens']:,} tokens. Predicted: on the texts of the next "
        "section, with its costs."
    )
