"""`SpecBoundConfig`: what an adapter's `config.json` says. Reads and writes JSON strictly; knows no tensors.

The file has no `model_type`, so that transformers never takes it for a model, and is never called
`adapter_config.json`, which transformers would take for PEFT.
"""

import hashlib
import json
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

from runtime.drafting.heads import HEAD_KINDS
from runtime.drafting.lookup import LookupTable
from runtime.drafting.policy import SpeculationBounds
from runtime.drafting.temperature import TemperatureSchedule
from runtime.errors import AdapterError, ConfigError
from runtime.fields import (
    MAX_CHARACTERS,
    Reader,
    check_keys,
    hash_of,
    kind,
    number,
    optional,
    parse_object,
    shown,
    text_of,
)

FORMAT = 1
VERSION = "0.1.0"
MAX_CONFIG_BYTES = MAX_CHARACTERS
MAX_DIMENSION = 10_000_000
MAX_LAYERS = 10_000

CONTENT_SHA256 = "content_sha256"  # of everything else in the file: tells a flipped byte from what was written


@dataclass(frozen=True, slots=True)
class SpecBoundConfig:
    """An adapter without its tensors.

    Attributes:
        base_model_name_or_path: Hub id or folder of the base it was fitted on.
        base_model_revision: commit on the Hub; None for a folder.
        base_model_fingerprint: see `identity.base_fingerprint`.
        tokenizer_fingerprint: see `identity.tokenizer_fingerprint`.
        num_hidden_layers, hidden_size, vocab_size: shape of the base.
        exit_layers: decoder layers below each exit, ascending.
        head: one of `HEAD_KINDS`.
        head_rank: inner width of a head that has one.
        draft_vocab_size: draft logits of a head; equal to `vocab_size` for the whole vocabulary.
        temperatures: exit temperatures.
        bounds: default bounds.
        weights_sha256: of `model.safetensors`.
        license: SPDX-like id of the adapter's licence; None if not stated.
        lookup: confidences of the depth-0 exit; None if it is off.
    """

    base_model_name_or_path: str
    base_model_revision: str | None
    base_model_fingerprint: str
    tokenizer_fingerprint: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    exit_layers: tuple[int, ...]
    head: str
    head_rank: int
    draft_vocab_size: int
    temperatures: TemperatureSchedule
    bounds: SpeculationBounds
    weights_sha256: str
    license: str | None = None
    lookup: LookupTable | None = None

    def __post_init__(self) -> None:
        layers, last = list(self.exit_layers), self.num_hidden_layers - 1
        if not 1 <= self.num_hidden_layers <= MAX_LAYERS:
            raise ConfigError(f"num_hidden_layers is {shown(self.num_hidden_layers)}: expected 1 to {MAX_LAYERS}")
        if not layers or layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] > last:
            raise ConfigError(
                f"exit_layers is {shown(layers)}: expected different layers in ascending order, each from 1 to {last}"
            )
        if self.head not in HEAD_KINDS:
            raise ConfigError(f"head is {shown(self.head)}: expected one of {', '.join(HEAD_KINDS)}")
        for name in ("hidden_size", "vocab_size", "head_rank", "draft_vocab_size"):
            value = getattr(self, name)
            if not 1 <= value <= MAX_DIMENSION:
                raise ConfigError(f"{name} is {shown(value)}: expected a number from 1 to {MAX_DIMENSION}")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(
                f"draft_vocab_size is {self.draft_vocab_size}: expected at most vocab_size, {self.vocab_size}"
            )
        others = set(self.bounds.exit_thresholds) - {0, *layers}
        if others:
            raise ConfigError(f"exit_thresholds are for layers {shown(sorted(others))}: expected 0 or an exit layer")
        given = sorted(self.temperatures.temperatures)
        if given != layers:
            raise ConfigError(f"exit temperatures are for layers {shown(given)}: expected {shown(layers)}")
        for name, value in [
            ("exit_threshold", self.bounds.exit_threshold),
            ("sure_threshold", self.bounds.sure_threshold),
            *(("exit_thresholds", value) for value in self.bounds.exit_thresholds.values()),
            ("alpha", self.temperatures.alpha),
        ]:
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{name} is {value}: expected a finite number")

    def to_json(self) -> str:
        """Text of `config.json`, keys sorted."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        schedule = self.temperatures
        fields["exit_layers"] = list(self.exit_layers)
        fields["bounds"] = {name: getattr(self.bounds, name) for name in _BOUNDS}
        own = self.bounds.exit_thresholds.items()
        fields["bounds"]["exit_thresholds"] = {str(layer): value for layer, value in sorted(own)}
        fields["temperatures"] = {
            "kind": schedule.kind,
            "alpha": schedule.alpha,
            "temperatures": {str(layer): schedule[layer] for layer in self.exit_layers},
        }
        fields["lookup"] = None if self.lookup is None else [list(row) for row in self.lookup.rows]
        fields |= {"format": FORMAT, "specbound_version": VERSION}
        fields[CONTENT_SHA256] = _content_sha256(fields)
        return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> "SpecBoundConfig":
        """Read `config.json`; warns of unknown keys, and where its content is not what was written.

        Args:
            source: name of the file, for messages.

        Raises:
            AdapterError: not JSON, a newer format, a key missing or a value of the wrong kind.
        """
        fields = parse_object(text, source)
        _check_format(fields, source)
        missing = sorted({*_FIELDS, CONTENT_SHA256} - set(fields))
        if missing:
            raise AdapterError(f"{source} is not whole: missing keys {missing}; download it again")
        try:
            config = cls(**{name: read(fields[name], name) for name, read in _FIELDS.items()})
            is_as_written = fields[CONTENT_SHA256] == _content_sha256(fields)
        except (ConfigError, RecursionError) as error:
            raise AdapterError(f"{source}: {error}") from None
        unknown = sorted(set(fields) - {*_FIELDS, *_STAMPS})
        if unknown:
            warnings.warn(f"{source}: unknown keys {shown(unknown)} are ignored", stacklevel=2)
        if not is_as_written:
            warnings.warn(f"{source} was changed after it was written: edited by hand, or damaged", stacklevel=2)
        return config


def _content_sha256(fields: dict[str, Any]) -> str:
    content = {key: value for key, value in fields.items() if key != CONTENT_SHA256}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _check_format(fields: dict[str, Any], source: str) -> None:
    file_format, version = fields.get("format"), fields.get("specbound_version")
    if type(file_format) is not int or file_format < 1:
        raise AdapterError(f"{source} is not of a SpecBound adapter: its 'format' is {shown(file_format)}")
    if file_format > FORMAT:
        wanted = f"specbound >= {version}" if _is_version(version) else "a newer specbound"
        raise AdapterError(f"{source} has format {shown(file_format)}, this version reads {FORMAT}: install {wanted}")
    if not _is_version(version):
        raise AdapterError(f"{source}: specbound_version is {shown(version)}: expected one such as {VERSION}")


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+-]{0,30}", value) is not None


def _layers(value: Any, name: str) -> tuple[int, ...]:
    return tuple(kind(int)(item, name) for item in kind(list)(value, name))


def _bounds(value: Any, name: str) -> SpeculationBounds:
    if isinstance(value, dict):  # adapters from before these keys, whose drafts are chains
        value = _CHAIN | value
    check_keys(value, name, _BOUNDS)
    return SpeculationBounds(**{key: read(value[key], f"{name}.{key}") for key, read in _BOUNDS.items()})


def _by_layer(value: Any, name: str) -> dict[int, float]:
    layers = kind(dict)(value, name)
    if not all(re.fullmatch("0|[1-9][0-9]{0,5}", layer) for layer in layers):
        raise ConfigError(f"{name} has keys {shown(sorted(layers))}: expected layer numbers")
    return {int(layer): number(item, f"{name}.{layer}") for layer, item in layers.items()}


def _temperatures(value: Any, name: str) -> TemperatureSchedule:
    check_keys(value, name, ("kind", "alpha", "temperatures"))
    return TemperatureSchedule(
        kind=kind(str)(value["kind"], f"{name}.kind"),
        alpha=optional(number)(value["alpha"], f"{name}.alpha"),
        temperatures=_by_layer(value["temperatures"], f"{name}.temperatures"),
    )


def _lookup(value: Any, name: str) -> LookupTable:
    rows = [kind(list)(row, name) for row in kind(list)(value, name)]
    return LookupTable(tuple(tuple(number(cell, name) for cell in row) for row in rows))


_STAMPS = {"format", "specbound_version", CONTENT_SHA256}
_BOUNDS: dict[str, Reader] = {
    "exit_threshold": number,
    "max_exit_layer": kind(int),
    "max_draft_tokens": kind(int),
    "exit_thresholds": _by_layer,
    "min_survival": number,
    "min_draft_survival": number,
    "max_branches": kind(int),
    "max_depth": optional(kind(int)),
    "sure_threshold": number,
}
_CHAIN: dict[str, Any] = {"exit_thresholds": {}, "min_survival": 0.0, "min_draft_survival": 0.0}
_CHAIN |= {"max_branches": 1, "max_depth": None, "sure_threshold": 0.0}
_FIELDS: dict[str, Reader] = {
    "base_model_name_or_path": text_of,
    "base_model_revision": optional(text_of),
    "base_model_fingerprint": hash_of("sha256:"),
    "tokenizer_fingerprint": hash_of("sha256:"),
    "num_hidden_layers": kind(int),
    "hidden_size": kind(int),
    "vocab_size": kind(int),
    "exit_layers": _layers,
    "head": kind(str),
    "head_rank": kind(int),
    "draft_vocab_size": kind(int),
    "temperatures": _temperatures,
    "bounds": _bounds,
    "weights_sha256": hash_of(""),
    "license": optional(text_of),
    "lookup": optional(_lookup),
}
