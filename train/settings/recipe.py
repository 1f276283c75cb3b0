"""Recipes: read a YAML file of settings strictly, by name and type."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin
from urllib.parse import urlencode

import yaml

from runtime.errors import ConfigError


def read_recipe(path: Path, *, types: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings in a file, each converted to its type in `types`.

    Args:
        types: the type of each setting: str, int, float, bool, a list of one of these, or one of these or None.

    Raises:
        ConfigError: as `read_mapping`, or a setting is unknown or wrongly typed.
    """
    content = read_mapping(path)
    refuse_unknown([str(key) for key in content], known=types, where=str(path))
    return {key: convert(value, types[key], where=f"{path}: {key}") for key, value in content.items()}


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read the lines `setting: value` of a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, has other content, or gives a setting twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ConfigError(f"{where}: not valid YAML ({reason}); expected lines `setting: value`") from error
    if content is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected lines `setting: value`, got {content!a:.60}")
    seen = set()
    for key, _ in root.value:  # in YAML a repeated key silently replaces the first one
        if key.value in seen:
            raise ConfigError(f"{path}, line {key.start_mark.line + 1}: {key.value} is given twice; delete one")
        seen.add(key.value)
    assert isinstance(content, dict)
    return content


def refuse_unknown(given: Collection[str], *, known: Collection[str], where: str, prefix: str = "") -> None:
    """Raise a ConfigError if a given name is unknown; the message suggests the nearest known name."""
    for name in sorted(given):
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError(f"{where}: unknown setting {prefix}{name}{hint}; see --help for all settings")


def nearest(name: str, names: Collection[str]) -> str:
    """Return `" (did you mean NAME?)"` with the nearest of the names, or an empty string if none is near."""
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def convert(value: Any, kind: Any, *, where: str) -> Any:
    """A value of a recipe as its type, one of those of `read_recipe`; a ConfigError where it cannot be one."""
    if type(None) in get_args(kind):
        return None if value is None else convert(value, get_args(kind)[0], where=where)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, such as [{value!r}]; got {value!r}")
        return [convert(entry, get_args(kind)[0], where=where) for entry in value]
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, dict) and value.get("path"):
        return _as_text(value)
    # YAML reads 1e-4 as text, so numbers may be given as text. A bool is True, False or what YAML reads as one.
    allowed = {str: (str,), int: (int, str), float: (int, float, str), bool: ()}[kind]
    if isinstance(value, allowed) and not isinstance(value, bool):
        try:
            return kind(value)
        except (ValueError, OverflowError):
            pass
    hint = "; put it in quotes" if kind is str and value is not None else ""
    raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r} ({type(value).__name__}){hint}")


def _as_text(mapping: Mapping[str, Any]) -> str:
    """A mapping of a path and settings in the form of the command line, see `train.settings.source`."""
    rest = {name: str(value).lower() if isinstance(value, bool) else value for name, value in mapping.items()}
    path = rest.pop("path")
    query = urlencode({name: value for name, value in rest.items() if value is not None})
    return f"{path}?{query}" if query else str(path)
