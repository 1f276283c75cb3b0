"""From fitted heads to an adapter folder: calibrated, with its evidence, its provenance and a card.

Knows no fitting loop and no network.
"""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor
from tqdm import tqdm

from runtime.adapter import WEIGHTS_FILE, Adapter, load_adapter, save_adapter
from runtime.config import VERSION, SpecBoundConfig
from runtime.files import write_atomic
from runtime.heads import DraftUnembedding, ExitHeads
from runtime.identity import base_fingerprint, file_sha256, tokenizer_fingerprint
from runtime.temperature import TemperatureSchedule
from train.ablations import ablate
from train.calibrate import collect, fit_schedule
from train.card import card
from train.costs import CostTable
from train.lookup_traces import LookupTraces
from train.options import FitConfig
from train.plots import precision_plot, reliability_plot, sources_plot, speed_plot
from train.reliability import compare_schedules, report
from train.replay import Replayed, Replayer
from train.splits import Split
from train.traces import TRACES_FILE, Traces
from train.tuning import Held, tune

LOOKUP_LAYER = 0
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "specbound")


def publish_locally(
    config: FitConfig,
    model: Any,
    tokenizer: Any,
    heads: ExitHeads,
    draft_to_target: Tensor,
    unembedding: DraftUnembedding,
    target_to_draft: Tensor,
    *,
    calibration: Split,
    evidence: dict[str, Any],
) -> Path:
    """Calibrate the heads and write `output_dir/adapter`; returns the folder.

    Raises:
        DataError: too little calibration text, or logits that are not finite.
        AdapterError: the folder cannot be written.
    """
    batches = calibration.batches(config.per_device_train_batch_size)
    found = collect(tqdm(batches, "calibrate", unit="batch"), heads, unembedding, target_to_draft)
    schedule, scores = fit_schedule(found, config.schedule, model.config.num_hidden_layers)
    looked_up = LookupTraces.collect(calibration.sequences.rows, found.targets)
    table = looked_up.fit()
    by_lookup = {LOOKUP_LAYER: looked_up.confidences(table)}
    traces = Traces.join(
        found.at(schedule) | by_lookup,
        found.right | {LOOKUP_LAYER: looked_up.right},
        found.sequence,
        np.array([len(prompt) for prompt, _ in calibration.sequences.rows]),
        uncalibrated=found.at(TemperatureSchedule.none(config.exit_layers)) | by_lookup,
    )
    costs = counted_costs(model, heads, unembedding)
    held = Held(config.exit_threshold, config.max_exit_layer, config.max_draft_tokens)
    bounds, replayed = tune(traces, costs, held)
    calibrated = report(found, schedule) | {
        "negative_log_likelihood": scores,
        "lookup": looked_up.report(table),
        "schedules": compare_schedules(found, model.config.num_hidden_layers),
        "replay": prediction(replayed, costs),
        "ablations": ablate(traces, bounds, costs),
    } | evidence  # fmt: skip
    adapter_config = SpecBoundConfig(
        base_model_name_or_path=portable(config.model_name_or_path),
        base_model_revision=getattr(model.config, "_commit_hash", None),
        base_model_fingerprint=base_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        num_hidden_layers=model.config.num_hidden_layers,
        hidden_size=model.config.hidden_size,
        vocab_size=len(target_to_draft),
        exit_layers=tuple(config.exit_layers),
        head=config.head,
        head_rank=config.head_rank,
        draft_vocab_size=len(draft_to_target),
        temperatures=schedule,
        bounds=bounds,
        weights_sha256="",
        license=config.license,
        lookup=table,
    )
    folder = Path(config.output_dir) / "adapter"
    adapter = Adapter(adapter_config, heads, draft_to_target)

    def evidence_files(path: Path) -> None:
        (path / "run.yaml").write_text(yaml.safe_dump(_provenance(config), sort_keys=True), encoding="utf-8")
        reliability_plot(found, schedule, path / "reliability.png")
        traces.write(path / TRACES_FILE, weights_sha256=file_sha256(path / WEIGHTS_FILE))
        write_replayed(path, traces, costs, adapter_config, calibrated)

    save_adapter(adapter, folder, extra=evidence_files)
    return folder


def write_replayed(
    folder: Path, traces: Traces, costs: CostTable, config: SpecBoundConfig, calibrated: dict[str, Any]
) -> None:
    """What changes with the bounds: `calibration.json`, the pictures of the replay, and the card."""
    replayer = Replayer(traces, costs)
    precision_plot(traces, config.bounds, folder / "precision.png")
    speed_plot(replayer, config.bounds, folder / "speed.png")
    sources_plot(replayer.run(config.bounds), folder / "sources.png")
    (folder / "calibration.json").write_text(json.dumps(calibrated, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(config, calibrated), encoding="utf-8")


def prediction(replayed: Replayed, costs: CostTable) -> dict[str, Any]:
    """What a replay says, for `calibration.json`."""
    low, high = replayed.speedup_interval()
    return {
        "mean_accepted_length": replayed.mean_accepted_length,
        "acceptance_rate": replayed.acceptance_rate,
        "drafted": {str(layer): count for layer, count in sorted(replayed.drafted.items())},
        "accepted": {str(layer): count for layer, count in sorted(replayed.accepted.items())},
        "predicted_speedup": replayed.speedup,
        "predicted_speedup_interval": [low, high],
        "costs": dict(costs.conditions) or "layer counts, not measured times",
    }


def counted_costs(model: Any, heads: ExitHeads, unembedding: DraftUnembedding) -> CostTable:
    """Costs by counting weights: a head or an unembedding against one decoder layer."""
    total = sum(parameter.numel() for parameter in model.parameters())
    matrix = model.get_output_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    layer = (total - matrix * (1 if tied else 2)) / model.config.num_hidden_layers
    head = sum(parameter.numel() for parameter in heads.parameters()) / len(heads.exit_layers)
    if not hasattr(next(iter(heads.heads.values())), "weight"):
        head += unembedding.weight.numel()
    return CostTable.counted(model.config.num_hidden_layers, head=head / layer, unembedding=matrix / layer)


def portable(name: str) -> str:
    """A base's name without a machine's path: Hub ids and relative folders as they are."""
    path = Path(name)
    return path.name if path.is_absolute() else name


def _provenance(config: FitConfig) -> dict[str, Any]:
    """Settings and versions, without paths of this machine."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        return portable(value) if isinstance(value, str) else value

    settings = {name: clean(getattr(config, name)) for name in config.sources}
    return {
        "settings": settings,
        "versions": versions(),
        "python": platform.python_version(),
        "specbound": VERSION,
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def add_speed(folder: Path, speed: dict[str, Any]) -> None:
    """Write an adapter's card anew, with figures measured by `runtime.benchmark`."""
    config = load_adapter(folder).config
    calibrated = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    write_atomic(folder / "README.md", card(config, calibrated, speed).encode())
