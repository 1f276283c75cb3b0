"""`SpecBoundConfig`: what an adapter's `config.json` says. Reads and writes JSON strictly; knows no tensors.

The file has no `model_type`, so that transformers never takes it for a model, and is never called
`adapter_config.json`, which transformers would take for PEFT.
"""

import json
import warnings
from dataclasses import dataclass
from typing import Any

from runtime.errors import AdapterError, ConfigError
from runtime.heads import HEAD_KINDS
from runtime.policy import SpeculationBounds
from runtime.temperature import TemperatureSchedule

FORMAT = 1
VERSION = "0.1.0"
MAX_CONFIG_BYTES = 1_000_000
MAX_DIMENSION = 10_000_000


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
        head_rank: inner width of a `residual` or `lora` head.
        draft_vocab_size: draft logits of a head; equal to `vocab_size` for the whole vocabulary.
        temperatures: exit temperatures.
        bounds: default bounds.
        weights_sha256: of `model.safetensors`.
        license: SPDX-like id of the adapter's licence; None if not stated.
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

    def __post_init__(self) -> None:
        layers = list(self.exit_layers)
        if not layers or layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] >= self.num_hidden_layers:
            raise ConfigError(
                f"exit_layers are {layers}: expected different layers in ascending order, "
                f"each from 1 to {self.num_hidden_layers - 1}"
            )
        if self.head not in HEAD_KINDS:
            raise ConfigError(f"head is {self.head!r}: expected one of {', '.join(HEAD_KINDS)}")
        for name in ("hidden_size", "vocab_size", "head_rank", "draft_vocab_size"):
            value = getattr(self, name)
            if not 1 <= value <= MAX_DIMENSION:
                raise ConfigError(f"{name} is {value}: expected a number from 1 to {MAX_DIMENSION}")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(f"draft_vocab_size is {self.draft_vocab_size}: expected at most {self.vocab_size}")
        if set(self.temperatures.temperatures) != set(layers):
            raise ConfigError(f"exit temperatures are for layers {sorted(self.temperatures.temperatures)}, not {layers}")

    def to_json(self) -> str:
        """Text of `config.json`, keys sorted."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        fields["exit_layers"] = list(self.exit_layers)
        fields["bounds"] = {name: getattr(self.bounds, name) for name in _BOUNDS}
        schedule = self.temperatures
        temperatures = {str(layer): schedule[layer] for layer in self.exit_layers}
        fields["temperatures"] = {"kind": schedule.kind, "alpha": schedule.alpha, "temperatures": temperatures}
        fields |= {"format": FORMAT, "specbound_version": VERSION}
        return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> "SpecBoundConfig":
        """Read `config.json`.

        Args:
            source: name of the file, for messages.

        Raises:
            AdapterError: not JSON, a newer format, a key missing or a value of the wrong kind.
        """
        fields = _parse(text, source)
        found = fields.pop("format", None)
        if type(found) is not int:
            raise AdapterError(f"{source} is not a SpecBound adapter: it has no 'format' number")
        if found > FORMAT:
            wanted = fields.get("specbound_version", "a newer version")
            raise AdapterError(f"{source} has format {found}, this version reads {FORMAT}: needs specbound >= {wanted}")
        fields.pop("specbound_version", None)
        unknown = sorted(set(fields) - set(_FIELDS))
        if unknown:
            warnings.warn(f"{source}: unknown keys {unknown} are ignored", stacklevel=2)
        missing = sorted(set(_FIELDS) - set(fields))
        if missing:
            raise AdapterError(f"{source} is not whole: missing keys {missing}")
        try:
            return cls(**{name: _FIELDS[name](fields[name], name) for name in _FIELDS})
        except ConfigError as error:
            raise AdapterError(f"{source}: {error}") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(keys) != len(set(keys)):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is not a number")

    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{source} is {len(text)} characters long: expected at most {MAX_CONFIG_BYTES}")
    try:
        fields = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise AdapterError(f"{source} holds {type(fields).__name__}: expected a JSON object")
    return fields


def _kind(*kinds: type) -> Any:
    def read(value: Any, name: str) -> Any:
        if type(value) not in kinds:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ConfigError(f"{name} is {value!r}: expected {wanted}")
        return value

    return read


def _layers(value: Any, name: str) -> tuple[int, ...]:
    return tuple(_kind(int)(item, name) for item in _kind(list)(value, name))


def _bounds(value: Any, name: str) -> SpeculationBounds:
    _keys(value, name, _BOUNDS)
    return SpeculationBounds(**{key: read(value[key], f"{name}.{key}") for key, read in _BOUNDS.items()})


def _temperatures(value: Any, name: str) -> TemperatureSchedule:
    _keys(value, name, {"kind", "alpha", "temperatures"})
    by_layer = _kind(dict)(value["temperatures"], f"{name}.temperatures")
    if not all(layer.isdecimal() for layer in by_layer):
        raise ConfigError(f"{name}.temperatures has keys {sorted(by_layer)}: expected layer numbers")
    return TemperatureSchedule(
        kind=_kind(str)(value["kind"], f"{name}.kind"),
        alpha=_kind(float, int, type(None))(value["alpha"], f"{name}.alpha"),
        temperatures={int(layer): float(_kind(float, int)(t, name)) for layer, t in by_layer.items()},
    )


def _keys(value: Any, name: str, wanted: Any) -> None:
    if not isinstance(value, dict) or set(value) != set(wanted):
        found = sorted(value) if isinstance(value, dict) else value
        raise ConfigError(f"{name} is {found!r}: expected an object with the keys {sorted(wanted)}")


_BOUNDS = {"exit_threshold": _kind(float, int), "max_exit_layer": _kind(int), "max_draft_tokens": _kind(int)}
_FIELDS: dict[str, Any] = {
    "base_model_name_or_path": _kind(str),
    "base_model_revision": _kind(str, type(None)),
    "base_model_fingerprint": _kind(str),
    "tokenizer_fingerprint": _kind(str),
    "num_hidden_layers": _kind(int),
    "hidden_size": _kind(int),
    "vocab_size": _kind(int),
    "exit_layers": _layers,
    "head": _kind(str),
    "head_rank": _kind(int),
    "draft_vocab_size": _kind(int),
    "temperatures": _temperatures,
    "bounds": _bounds,
    "weights_sha256": _kind(str),
    "license": _kind(str, type(None)),
}
