"""Numbers of several texts in one dataclass: joined, moved to a device, split into those of each text.

A field is a tensor of N positions, a dictionary of such, `lengths` (positions of each text, summing to N), another
dataclass of this sort, or None.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def join(parts: Sequence[Any]) -> Any:
    """Concatenate the texts of several."""

    def joined(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {key: torch.cat([value[key] for value in values]) for key in first}
        if isinstance(first, list):
            return [length for value in values for length in value]
        return torch.cat(list(values)) if isinstance(first, Tensor) else first if first is None else join(values)

    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(**{name: joined([getattr(part, name) for part in parts]) for name in names})


def change(states: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same texts with a function of every tensor."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: function(entry) for key, entry in value.items()}
        if isinstance(value, Tensor):
            return function(value)
        return change(value, function) if is_dataclass(value) else value

    return replace(states, **{field.name: changed(getattr(states, field.name)) for field in fields(states)})


def split(states: Any) -> list[Any]:
    """Those of each text."""

    def pieces(value: Any) -> Sequence[Any]:
        if isinstance(value, dict):
            each = {key: entry.split(states.lengths) for key, entry in value.items()}
            return [{key: each[key][index] for key in each} for index in range(len(states.lengths))]
        if isinstance(value, list):
            return [[length] for length in value]
        if value is None:
            return [None] * len(states.lengths)
        return value.split(states.lengths) if isinstance(value, Tensor) else split(value)

    whole = {field.name: pieces(getattr(states, field.name)) for field in fields(states)}
    return [
        type(states)(**{name: parts[index] for name, parts in whole.items()}) for index in range(len(states.lengths))
    ]
