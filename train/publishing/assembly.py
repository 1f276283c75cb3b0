"""Calibrate fitted heads and write the adapter's folder, with evidence, provenance and card."""

import json
import logging
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from runtime.adapter.config import VERSION, SpecBoundConfig
from runtime.adapter.folder import WEIGHTS_FILE, Adapter, load_adapter, save_adapter
from runtime.adapter.identity import base_fingerprint, file_sha256, tokenizer_fingerprint
from runtime.base import find_base
from runtime.decoding.drafter import HeadDrafter
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.policy import SpeculationBounds
from runtime.files import write_atomic
from train.calibration.calibration import Calibration, calibrate
from train.calibration.traces import HELD_OUT_FILE, TRACES_FILE, Traces
from train.features.split import Split
from train.features.spread import first_says, is_spread, whole_parameters
from train.publishing.card import card
from train.publishing.contents import (
    BENCH_FILE,
    CALIBRATION_FILE,
    CARD_FILE,
    RUN_FILE,
    SPEED_FILE,
    write_custom_generate,
)
from train.publishing.evidence import summary
from train.publishing.plots import precision_plot, reliability_plot, sources_plot, speed_plot
from train.replay.agreement import check_agreement
from train.replay.costs import CostTable, counted_costs
from train.replay.replay import Replayer
from train.replay.search import Held, tune
from train.replay.sources import sources
from train.replay.variants import ablate
from train.settings.fit_config import FitConfig
from train.settings.source import Source

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "specbound")


def write_adapter(
    config: FitConfig,
    model: Any,
    tokenizer: Any,
    heads: DraftHeads,
    *,
    splits: Mapping[str, Split],
    evidence: dict[str, Any],
    write: bool = True,
) -> Path:
    """Calibrate the heads and write `output_dir/adapter`; returns the folder.

    Args:
        splits: `calibration` and `held_out`.
        write: whether this process writes the files. With a sharded base all processes calibrate and one writes.

    Raises:
        DataError: there is too little calibration text, or logits are not finite.
        SpecBoundError: replay and runtime accept different drafts on the same text.
        AdapterError: the folder cannot be written.
    """
    calibrated = calibrate(config, model, heads, splits["calibration"], splits["held_out"])
    unseen, costs = calibrated.unseen, counted_costs(model, heads)
    held, spread = Held(config.exit_threshold, config.max_exit_layer, config.max_draft_tokens), is_spread(model)

    def tuned() -> tuple[SpeculationBounds, dict[str, Any]]:
        bounds, replayed = tune(calibrated.traces, costs, held)
        return bounds, replayed.describe(costs)

    bounds, chosen = first_says(tuned) if spread else tuned()
    drafter = HeadDrafter(heads, calibrated.schedule, calibrated.lookup)
    compared = calibrated.rows, calibrated.told
    agreement = check_agreement(DecoderLayers(model), drafter, bounds, *compared, spread=spread)
    replayed = Replayer(unseen, costs).run(bounds).describe(costs)
    figures = calibrated.figures | {"replay": replayed, "ablations": ablate(unseen, bounds, costs)}
    figures["fitted_on"] = figures["fitted_on"] | {"replay": chosen}  # by which a sweep compares fits
    figures |= {
        "sources": sources(unseen, costs, bounds),
        "agreement": agreement,
        "datasets": _datasets(config),
    } | evidence
    adapter_config = _adapter_config(config, model, tokenizer, heads, calibrated, bounds)
    folder = Path(config.output_dir) / "adapter"
    adapter = Adapter(adapter_config, heads.exits, heads.draft_to_target)

    def evidence_files(path: Path) -> None:
        (path / RUN_FILE).write_text(yaml.safe_dump(_provenance(config), sort_keys=True), encoding="utf-8")
        write_custom_generate(path)
        reliability_plot(unseen, calibrated.schedule, path / "reliability.png")
        weights = file_sha256(path / WEIGHTS_FILE)
        calibrated.traces.write(path / TRACES_FILE, weights_sha256=weights)
        unseen.write(path / HELD_OUT_FILE, weights_sha256=weights)
        write_replayed(path, unseen, costs, adapter_config, figures)

    if write:
        save_adapter(adapter, folder, extra=evidence_files)
        logger.info("%s", summary(figures))
    return folder


def _adapter_config(
    config: FitConfig,
    model: Any,
    tokenizer: Any,
    heads: DraftHeads,
    calibrated: Calibration,
    bounds: SpeculationBounds,
) -> SpecBoundConfig:
    """Put together what the adapter says of itself; the hash of its weights is added where it is saved."""
    shape = model.config.get_text_config()
    return SpecBoundConfig(
        base_model_name_or_path=findable(config.model_name_or_path),
        base_model_revision=base_commit(config.model_name_or_path, config.model_revision),
        base_model_fingerprint=base_fingerprint(model, whole_parameters(model)),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        num_hidden_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        vocab_size=len(heads.target_to_draft),
        exit_layers=tuple(config.exit_layers),
        head=config.head,
        head_rank=config.head_rank,
        draft_vocab_size=len(heads.draft_to_target),
        temperatures=calibrated.schedule,
        bounds=bounds,
        weights_sha256="",
        license=config.license,
        lookup=calibrated.lookup,
    )


def write_replayed(
    folder: Path, traces: Traces, costs: CostTable, config: SpecBoundConfig, figures: dict[str, Any]
) -> None:
    """Write the files that depend on the bounds: `calibration.json`, the plots of the replay, and the card."""
    replayer = Replayer(traces, costs)
    precision_plot(traces, config.bounds, folder / "precision.png")
    speed_plot(replayer, config.bounds, folder / "speed.png")
    sources_plot(replayer.run(config.bounds), folder / "sources.png")
    text = json.dumps(figures, indent=2) + "\n"
    (folder / CALIBRATION_FILE).write_text(text, encoding="utf-8")
    (folder / CARD_FILE).write_text(card(config, json.loads(text)), encoding="utf-8")  # as `write_card` reads it


def findable(name: str) -> str:
    """Return a base's name for use on this machine: a folder outside the current one by its absolute path."""
    path = Path(name)
    return str(path.resolve()) if path.is_dir() and (path.is_absolute() or ".." in path.parts) else name


def portable(name: str) -> str:
    """Return a name without paths or addresses of this machine; Hub ids and relative folders are unchanged."""
    path = Path(name)
    if "://" in name:
        return "URL"
    return path.name if path.is_absolute() or ".." in path.parts else name


def base_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a base that was loaded from the Hub, as the Hub's cache records it.

    The result is None for a folder and for a base that was downloaded from elsewhere.
    """
    if Path(name).exists() or find_base(name) != name:
        return None
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def _datasets(config: FitConfig) -> list[str]:
    """List the prompts' data sets on the Hub, without splits. Local files are left out."""
    sources = [Source.parse(text) for text in config.prompts]
    return [source.path for source in sources if not source.is_file and not Path(source.path).exists()]


def _provenance(config: FitConfig) -> dict[str, Any]:
    """Return settings and versions of the fit, without paths of this machine."""

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
    """Return the installed versions of the libraries that affect the results."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def add_speed(folder: Path, speed: dict[str, Any]) -> None:
    """Write figures of `train.evaluation.comparison` into an adapter's folder, and update its card."""
    write_atomic(folder / SPEED_FILE, (json.dumps(speed, indent=2, sort_keys=True) + "\n").encode())
    write_card(folder)


def write_card(folder: Path) -> None:
    """Write the card of an adapter's folder again, from the figures in the folder."""
    evidence: list[Any] = []
    for path in (folder / name for name in (CALIBRATION_FILE, SPEED_FILE, BENCH_FILE)):
        evidence.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
    write_atomic(folder / CARD_FILE, card(load_adapter(folder).config, *evidence).encode())
