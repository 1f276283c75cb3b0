"""Strict JSON, and readers that check one field: what was found, what was expected. Knows no adapter."""

import json
import math
import re
import reprlib
from collections.abc import Callable, Collection
from typing import Any

from runtime.errors import AdapterError, ConfigError

MAX_CHARACTERS = 1_000_000
MAX_TEXT = 500

Reader = Callable[[Any, str], Any]


def parse_object(text: str, source: str) -> dict[str, Any]:
    """The object a JSON text holds; `source` names the file.

    Raises:
        AdapterError: not JSON, too long, a key twice, NaN or infinity, or not an object.
    """

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

    if len(text) > MAX_CHARACTERS:
        raise AdapterError(f"{source} is {len(text)} characters long: expected at most {MAX_CHARACTERS}")
    try:
        fields = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{source} is not valid JSON, download it again: {error}") from None
    if not isinstance(fields, dict):
        raise AdapterError(f"{source} holds {type(fields).__name__}: expected a JSON object")
    return fields


def kind(*kinds: type) -> Reader:
    """A reader of values of exactly these types."""

    def read(value: Any, name: str) -> Any:
        if type(value) not in kinds:  # not isinstance: True is no number
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ConfigError(f"{name} is {shown(value)}: expected {wanted}")
        return value

    return read


def number(value: Any, name: str) -> float:
    """A number as a float."""
    try:
        return float(kind(float, int)(value, name))
    except OverflowError:
        raise ConfigError(f"{name} is {shown(value)}: expected a smaller number") from None


def text_of(value: Any, name: str) -> str:
    """Text that is safe to print: names come from strangers."""
    text: str = kind(str)(value, name)
    if not text.strip() or len(text) > MAX_TEXT or not text.isprintable():
        raise ConfigError(f"{name} is {shown(text)}: expected 1 to {MAX_TEXT} printable characters")
    return text


def hash_of(prefix: str) -> Reader:
    """A reader of `prefix` and 64 hexadecimal digits."""

    def read(value: Any, name: str) -> str:
        text: str = kind(str)(value, name)
        if not re.fullmatch(prefix + "[0-9a-f]{64}", text):
            raise ConfigError(f"{name} is {shown(text)}: expected {prefix}HASH, 64 hexadecimal digits")
        return text

    return read


def optional(reader: Callable[[Any, str], Any]) -> Reader:
    """A reader that takes null as well."""
    return lambda value, name: None if value is None else reader(value, name)


def check_keys(value: Any, name: str, wanted: Collection[str]) -> None:
    """Raise a ConfigError unless the value is an object with exactly these keys."""
    if not isinstance(value, dict) or set(value) != set(wanted):
        given = sorted(value) if isinstance(value, dict) else value
        raise ConfigError(f"{name} is {shown(given)}: expected an object with the keys {sorted(wanted)}")


def shown(value: Any) -> str:
    """A value of any kind and size for a message: short, on one line, in ASCII."""
    try:
        return ascii(reprlib.repr(value))[1:-1] if not isinstance(value, str) else ascii(value[:60])
    except ValueError:  # an integer too long to be printed
        return f"a {type(value).__name__}"
