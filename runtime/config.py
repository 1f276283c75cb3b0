"""`SpecBoundConfig`: what an adapter's `config.json` says. Reads and writes JSON strictly; knows no tensors.

The file has no `model_type`, so that transformers never takes it for a model, and is never called
`adapter_config.json`, which transformers would take for PEFT.
"""

import hashlib
import json
import math
import re
import reprlib
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from runtime.errors import AdapterError, ConfigError
from runtime.heads import HEAD_KINDS
from runtime.lookup import LookupTable
from runtime.policy import SpeculationBounds
from runtime.temperature import TemperatureSchedule

FORMAT = 1
VERSION = "0.1.0"
MAX_CONFIG_BYTES = 1_000_000
MAX_DIMENSION = 10_000_000
MAX_LAYERS = 10_000
MAX_TEXT = 500

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
        head_rank: inner width of a `residual` or `lora` head.
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
            raise ConfigError(f"num_hidden_layers is {_shown(self.num_hidden_layers)}: expected 1 to {MAX_LAYERS}")
        if not layers or layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] > last:
            raise ConfigError(
                f"exit_layers is {_shown(layers)}: expected different layers in ascending order, each from 1 to {last}"
            )
        if self.head not in HEAD_KINDS:
            raise ConfigError(f"head is {self.head!r}: expected one of {', '.join(HEAD_KINDS)}")
        for name in ("hidden_size", "vocab_size", "head_rank", "draft_vocab_size"):
            value = getattr(self, name)
            if not 1 <= value <= MAX_DIMENSION:
                raise ConfigError(f"{name} is {_shown(value)}: expected a number from 1 to {MAX_DIMENSION}")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(
                f"draft_vocab_size is {self.draft_vocab_size}: expected at most vocab_size, {self.vocab_size}"
            )
        given = sorted(self.temperatures.temperatures)
        if given != layers:
            raise ConfigError(f"exit temperatures are for layers {_shown(given)}: expected {_shown(layers)}")
        for name, number in (
            ("exit_threshold", self.bounds.exit_threshold),
            ("alpha", self.temperatures.alpha),
        ):
            if number is not None and not math.isfinite(number):
                raise ConfigError(f"{name} is {number}: expected a finite number")

    def to_json(self) -> str:
        """Text of `config.json`, keys sorted."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        schedule = self.temperatures
        fields["exit_layers"] = list(self.exit_layers)
        fields["bounds"] = {name: getattr(self.bounds, name) for name in _BOUNDS}
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
        fields = _parse(text, source)
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
            warnings.warn(f"{source}: unknown keys {_shown(unknown)} are ignored", stacklevel=2)
        if not is_as_written:
            warnings.warn(f"{source} was changed after it was written: edited by hand, or damaged", stacklevel=2)
        return config


def _content_sha256(fields: dict[str, Any]) -> str:
    content = {key: value for key, value in fields.items() if key != CONTENT_SHA256}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _shown(value: Any) -> str:
    """A value of any kind and size for a message: short, on one line, in ASCII."""
    try:
        return ascii(reprlib.repr(value))[1:-1] if not isinstance(value, str) else ascii(value[:60])
    except ValueError:  # an integer too long to be printed
        return f"a {type(value).__name__}"


def _check_format(fields: dict[str, Any], source: str) -> None:
    found, version = fields.get("format"), fields.get("specbound_version")
    if type(found) is not int or found < 1:
        raise AdapterError(f"{source} is not of a SpecBound adapter: its 'format' is {_shown(found)}")
    if found > FORMAT:
        wanted = f"specbound >= {version}" if _is_version(version) else "a newer specbound"
        raise AdapterError(f"{source} has format {_shown(found)}, this version reads {FORMAT}: install {wanted}")
    if not _is_version(version):
        raise AdapterError(f"{source}: specbound_version is {_shown(version)}: expected one such as {VERSION}")


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+-]{0,30}", value) is not None


def _parse(text: str, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(keys) != len(set(keys)):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is not a number")

    def finite(literal: str) -> float:
        number = float(literal)
        return number if math.isfinite(number) else refuse(literal[:20])  # type: ignore[func-returns-value,return-value]

    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{source} is {len(text)} characters long: expected at most {MAX_CONFIG_BYTES}")
    try:
        fields = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{source} is not valid JSON, download it again: {error}") from None
    if not isinstance(fields, dict):
        raise AdapterError(f"{source} holds {type(fields).__name__}: expected a JSON object")
    return fields


Reader = Callable[[Any, str], Any]


def _kind(*kinds: type) -> Reader:
    def read(value: Any, name: str) -> Any:
        if type(value) not in kinds:  # not isinstance: True is no number
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ConfigError(f"{name} is {_shown(value)}: expected {wanted}")
        return value

    return read


def _number(value: Any, name: str) -> float:
    try:
        return float(_kind(float, int)(value, name))
    except OverflowError:
        raise ConfigError(f"{name} is {_shown(value)}: expected a smaller number") from None


def _text(value: Any, name: str) -> str:
    """Text that is safe to print: names come from strangers."""
    text: str = _kind(str)(value, name)
    if not text.strip() or len(text) > MAX_TEXT or not text.isprintable():
        raise ConfigError(f"{name} is {_shown(text)}: expected 1 to {MAX_TEXT} printable characters")
    return text


def _hash(prefix: str) -> Reader:
    def read(value: Any, name: str) -> str:
        text: str = _kind(str)(value, name)
        if not re.fullmatch(prefix + "[0-9a-f]{64}", text):
            raise ConfigError(f"{name} is {_shown(text)}: expected {prefix}HASH, 64 hexadecimal digits")
        return text

    return read


def _optional(reader: Callable[[Any, str], Any]) -> Reader:
    return lambda value, name: None if value is None else reader(value, name)


def _layers(value: Any, name: str) -> tuple[int, ...]:
    return tuple(_kind(int)(item, name) for item in _kind(list)(value, name))


def _bounds(value: Any, name: str) -> SpeculationBounds:
    _keys(value, name, _BOUNDS)
    return SpeculationBounds(**{key: read(value[key], f"{name}.{key}") for key, read in _BOUNDS.items()})


def _temperatures(value: Any, name: str) -> TemperatureSchedule:
    _keys(value, name, ("kind", "alpha", "temperatures"))
    by_layer = _kind(dict)(value["temperatures"], f"{name}.temperatures")
    if not all(re.fullmatch("[1-9][0-9]{0,5}", layer) for layer in by_layer):
        raise ConfigError(f"{name}.temperatures has keys {_shown(sorted(by_layer))}: expected layer numbers")
    return TemperatureSchedule(
        kind=_kind(str)(value["kind"], f"{name}.kind"),
        alpha=_optional(_number)(value["alpha"], f"{name}.alpha"),
        temperatures={int(layer): _number(t, f"{name}.temperatures.{layer}") for layer, t in by_layer.items()},
    )


def _lookup(value: Any, name: str) -> LookupTable:
    rows = [_kind(list)(row, name) for row in _kind(list)(value, name)]
    return LookupTable(tuple(tuple(_number(cell, name) for cell in row) for row in rows))


def _keys(value: Any, name: str, wanted: Collection[str]) -> None:
    if not isinstance(value, dict) or set(value) != set(wanted):
        found = sorted(value) if isinstance(value, dict) else value
        raise ConfigError(f"{name} is {_shown(found)}: expected an object with the keys {sorted(wanted)}")


_STAMPS = {"format", "specbound_version", CONTENT_SHA256}
_BOUNDS: dict[str, Reader] = {
    "exit_threshold": _number,
    "max_exit_layer": _kind(int),
    "max_draft_tokens": _kind(int),
}
_FIELDS: dict[str, Reader] = {
    "base_model_name_or_path": _text,
    "base_model_revision": _optional(_text),
    "base_model_fingerprint": _hash("sha256:"),
    "tokenizer_fingerprint": _hash("sha256:"),
    "num_hidden_layers": _kind(int),
    "hidden_size": _kind(int),
    "vocab_size": _kind(int),
    "exit_layers": _layers,
    "head": _kind(str),
    "head_rank": _kind(int),
    "draft_vocab_size": _kind(int),
    "temperatures": _temperatures,
    "bounds": _bounds,
    "weights_sha256": _hash(""),
    "license": _optional(_text),
    "lookup": _optional(_lookup),
}
