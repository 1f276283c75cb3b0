"""The settings of a fit: one flat dataclass, read from a recipe file and from flags, then checked.

Flags override `--config FILE.yaml`. Checks against the base need only its depth and vocabulary size.
"""

# No postponed annotations: HfArgumentParser makes the flags from the types themselves.
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, get_type_hints

from transformers import HfArgumentParser

from runtime.drafting.heads import HEAD_KINDS
from runtime.drafting.temperature import SCHEDULE_KINDS
from runtime.errors import ConfigError
from train.settings.recipe import nearest, read_recipe, refuse_unknown
from train.settings.source import Source

CHOICES = {
    "dtype": ("float32", "bfloat16", "float16"),
    "answers": ("distil", "keep"),
    "chat_template": ("auto", "none"),
    "head": HEAD_KINDS,
    "features": ("online", "cache"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("auto", *SCHEDULE_KINDS),
}

# Lowest and highest value of these settings. All other numbers must be above 0, except max_steps.
_RANGES = {"draft_vocab_size": (0, math.inf), "weight_decay": (0, math.inf), "kl_weight": (0, math.inf)}
_RANGES |= {
    "seed": (0, 2**32 - 1),
    "sample_fraction": (0, 1),
    "warmup_ratio": (0, 1),
    "exit_threshold": (0, 1),
}
_RANGES |= {"max_skipped_batches": (0, math.inf), "calibration_fraction": (0, 1), "held_out_fraction": (0, 1)}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The settings of a fit. Lengths are in tokens; an exit at layer l reads the output of l decoder layers.

    `sources` maps each field to where its value came from: default, file or flag.
    """

    model_name_or_path: str = field(metadata=_help("base model: Hub id or folder"))
    model_revision: str | None = field(default=None, metadata=_help("branch, tag or commit of the base"))
    dtype: str = field(default="bfloat16", metadata=_help("dtype of the base: float32, bfloat16 or float16"))
    prompts: list[str] = field(metadata=_help("files or data sets (name or name:split), see docs/fitting.md"))
    prompt_limit: int | None = field(default=None, metadata=_help("read at most this many prompts from each source"))
    answers: str = field(
        default="distil", metadata=_help("distil (the base answers the prompts) or keep (those of the data)")
    )
    generator: str | None = field(
        default=None, metadata=_help("URL of an OpenAI-compatible engine that answers prompts")
    )
    evaluation_files: list[str] = field(default_factory=list, metadata=_help("drop prompts like those in these files"))
    corpus_dir: str | None = field(default=None, metadata=_help("folder of the corpus; default: output_dir/corpus"))
    calibration_fraction: float = field(default=0.1, metadata=_help("share of prompts kept for calibration"))
    held_out_fraction: float = field(default=0.1, metadata=_help("share of prompts kept for evaluation"))
    max_new_tokens: int = field(default=128, metadata=_help("longest answer, in tokens"))
    max_prompt_tokens: int = field(default=1024, metadata=_help("prompts with more tokens are skipped"))
    generation_batch_size: int = field(default=32, metadata=_help("prompts answered at a time"))
    sample_fraction: float = field(default=0.0, metadata=_help("share of answers sampled, not greedy"))
    temperature: float = field(default=1.0, metadata=_help("temperature of the sampled answers"))
    top_p: float = field(default=1.0, metadata=_help("top_p of the sampled answers"))
    chat_template: str = field(default="auto", metadata=_help("auto (the tokenizer's) or none (plain text)"))

    exit_layers: list[int] = field(metadata=_help("numbers of decoder layers after which there is an exit"))
    head: str = field(default="deep", metadata=_help("attention, deep, linear or lora"))
    head_rank: int = field(default=256, metadata=_help("inner width of a head"))
    draft_vocab_size: int = field(default=8192, metadata=_help("tokens a head can draft; 0: all"))

    init_adapter: str | None = field(
        default=None, metadata=_help("adapter (folder or Hub id) whose heads and vocabulary the fit begins with")
    )

    output_dir: str = field(metadata=_help("folder of the adapter, checkpoints and logs"))
    dry_run: bool = field(default=False, metadata=_help("go up to the first step, say what the fit takes, and stop"))
    features: str = field(
        default="online", metadata=_help("hidden states: online (computed each time) or cache (on disk)")
    )
    features_dir: str | None = field(
        default=None, metadata=_help("folder of cached features; default: output_dir/features")
    )
    per_device_train_batch_size: int = field(default=8, metadata=_help("sequences per batch"))
    gradient_accumulation_steps: int = field(default=1, metadata=_help("batches per step"))
    num_train_epochs: float = field(default=3.0, metadata=_help("passes over the fit split"))
    max_steps: int = field(default=-1, metadata=_help("if above 0, overrides num_train_epochs"))
    learning_rate: float = field(default=1e-3, metadata=_help("the highest rate, reached after warm-up"))
    optimizer: str = field(default="adamw", metadata=_help("adamw, or muon: muon for matrices, adamw for the rest"))
    weight_decay: float = field(default=0.01, metadata=_help("weight decay of the optimizer"))
    warmup_ratio: float = field(default=0.05, metadata=_help("share of the steps that warm up"))
    max_grad_norm: float = field(default=1.0, metadata=_help("gradients are clipped to this norm"))
    max_skipped_batches: int = field(default=10, metadata=_help("stop after more batches without a finite loss"))
    kl_weight: float = field(default=0.5, metadata=_help("weight of the divergence from the base"))
    teacher_top_k: int = field(default=32, metadata=_help("most likely tokens of the base that the loss uses"))
    max_length: int | None = field(
        default=None, metadata=_help("cut prompt and response to this; default: max_prompt_tokens + max_new_tokens")
    )
    seed: int = field(default=0, metadata=_help("seed of heads, order and sampling"))
    logging_steps: int = field(default=10, metadata=_help("steps between log lines"))
    eval_steps: int | None = field(default=None, metadata=_help("steps between evaluations; default: an epoch"))
    early_stopping_patience: int | None = field(
        default=None, metadata=_help("stop after so many evaluations without a new best; default: never")
    )
    save_steps: int = field(default=200, metadata=_help("steps between checkpoints"))
    save_total_limit: int = field(default=2, metadata=_help("checkpoints kept"))
    load_best_model_at_end: bool = field(default=True, metadata=_help("use the best checkpoint, not the last step"))
    resume_from_checkpoint: str | None = field(default=None, metadata=_help("latest, or a checkpoint folder"))
    report_to: list[str] = field(default_factory=list, metadata=_help("trackers, such as tensorboard"))

    schedule: str = field(default="auto", metadata=_help("exit temperatures: auto, linear, fitted, monotone, none"))
    exit_threshold: float | None = field(default=None, metadata=_help("default: chosen on calibration data"))
    max_exit_layer: int | None = field(
        default=None, metadata=_help("deepest exit used; default: chosen on calibration data")
    )
    max_draft_tokens: int | None = field(
        default=None, metadata=_help("longest draft; default: chosen on calibration data")
    )

    license: str | None = field(default=None, metadata=_help("licence of the adapter"))
    push_to_hub: bool = field(default=False, metadata=_help("publish the adapter to a private repository"))
    hub_model_id: str | None = field(default=None, metadata=_help("repository to publish to: ORG/NAME"))

    sources: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def corpus_path(self) -> Path:
        """The corpus folder: `corpus_dir`, or `corpus` in the output folder."""
        return Path(self.corpus_dir or Path(self.output_dir) / "corpus")

    @property
    def features_path(self) -> Path:
        """The folder of cached features: `features_dir`, or `features` in the output folder."""
        return Path(self.features_dir or Path(self.output_dir) / "features")

    @property
    def longest(self) -> int:
        """Tokens of prompt and response together, at most: `max_length`, or what the corpus may have."""
        return self.max_length or self.max_prompt_tokens + self.max_new_tokens


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def parse_config(argv: Sequence[str]) -> FitConfig:
    """Read the settings from flags and from the YAML file that `--config` names; flags override the file.

    Args:
        argv: the command line without the program's name.

    Raises:
        ConfigError: an unknown or wrongly typed key or flag, a missing setting, or an unreadable file.
    """
    pre_parser = _Parser(add_help=False, allow_abbrev=False)
    pre_parser.add_argument("--config")
    chosen, rest = pre_parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-"):  # argparse would name the settings that a recipe would have
        raise ConfigError(f"command line: {rest[0]!r} belongs to no flag; give a recipe as --config FILE")
    types = {name: kind for name, kind in get_type_hints(FitConfig).items() if name != "sources"}
    flags = {part[2:].split("=")[0].replace("-", "_") for part in rest if part.startswith("--")}
    flags -= {"help"}
    refuse_unknown(flags, known=types, where="command line", prefix="--")
    values = read_recipe(Path(chosen.config), types=types) if chosen.config is not None else {}
    parser = _Parser([FitConfig], allow_abbrev=False)  # type: ignore[list-item]
    parser.add_argument("--config", help="recipe: a YAML file of these settings; flags override it")
    parser.set_defaults(**values)
    for action in parser._actions:  # argparse demands a required flag even if it has a default
        action.required = action.required and action.dest not in values
    config, _, extra = parser.parse_args_into_dataclasses(
        rest, look_for_args_file=False, return_remaining_strings=True
    )
    if extra:
        raise ConfigError(f"command line: {extra[0]!r} belongs to no flag; give a recipe as --config FILE")
    assert isinstance(config, FitConfig)
    for name in types:
        config.sources[name] = "flag" if name in flags else "file" if name in values else "default"
    if config.report_to == ["none"]:
        config.report_to.clear()
    return config


def validate(config: FitConfig) -> None:
    """Check every setting that can be checked without the base.

    Raises:
        ConfigError: a value is out of its range. The message names the setting, the value and what was expected.
    """
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        _require(value in choices, name, value, f"one of {', '.join(choices)}{nearest(value, choices)}")
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            _require(math.isfinite(value), entry.name, value, "a finite number")
            if entry.name in _RANGES:
                low, high = _RANGES[entry.name]
                bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                _require(low <= value <= high, entry.name, value, bound)
            elif entry.name != "max_steps":
                _require(value > 0, entry.name, value, "a number above 0")
    _require(config.max_steps == -1 or config.max_steps > 0, "max_steps", config.max_steps, "-1 or above 0")
    for name in ("model_name_or_path", "output_dir", "prompts"):
        _require(bool(getattr(config, name)), name, getattr(config, name), "a value that is not empty")
    for source in (*config.prompts, *config.evaluation_files):
        Source.parse(source)
    given = config.answers == "keep"
    _require(not (given and config.generator), "generator", config.generator, "none, since answers: keep asks nobody")
    for name in ("top_p", "learning_rate"):
        _require(getattr(config, name) <= 1, name, getattr(config, name), "at most 1")
    parts = (config.calibration_fraction, config.held_out_fraction)
    _require(sum(parts) < 1, "calibration_fraction and held_out_fraction", parts, "a sum below 1")
    _require(not config.push_to_hub or bool(config.hub_model_id), "hub_model_id", None, "ORG/NAME, with push_to_hub")
    layers = config.exit_layers
    correct = bool(layers) and layers[0] >= 1 and layers == sorted(set(layers))
    _require(correct, "exit_layers", layers, "layers from 1 on, each once, in rising order, such as [4, 8]")
    deepest = config.max_exit_layer
    _require(deepest is None or deepest >= layers[0], "max_exit_layer", deepest, f"at least {layers[0]}")


def validate_against_model(config: FitConfig, *, num_hidden_layers: int, vocab_size: int) -> None:
    """Check the settings that depend on the base's depth and vocabulary.

    Raises:
        ConfigError: as for `validate`, which must be called first.
    """
    last = num_hidden_layers - 1
    layers, deepest, size = config.exit_layers, config.max_exit_layer, config.draft_vocab_size
    _require(layers[-1] <= last, "exit_layers", layers, f"layers in 1 to {last} of a model of {last + 1}")
    _require(deepest is None or deepest <= last, "max_exit_layer", deepest, f"at most {last}")
    _require(size <= vocab_size, "draft_vocab_size", size, f"at most the model's {vocab_size}, or 0 for all")
    kept = config.teacher_top_k
    _require(kept <= vocab_size, "teacher_top_k", kept, f"at most the model's {vocab_size} tokens")


def _require(correct: bool, name: str, value: object, expected: str) -> None:
    if not correct:
        raise ConfigError(f"{name}: expected {expected}; got {value!r}")
