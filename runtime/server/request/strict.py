"""`Strict`: what the parts of every body have in common."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

# Of objects and lists in one another: pydantic writes no more than 255, Python reads no more than 1,000.
MAX_DEPTH = 100
TOO_DEEP = f"is nested deeper than the {MAX_DEPTH} levels that are taken: send it flatter"
# Bytes are the whole body, of another type.
AS_JSON = ", sent with the header Content-Type: application/json"


def describe(schema: dict[str, Any]) -> None:
    """Say in the document that null is as if nothing were said, in fields that nobody knows too."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    schema["additionalProperties"] = {"type": "null"}


def without_null(value: Any) -> Any:
    """An object without what it says nothing of; any other value as it is."""
    return {key: one for key, one in value.items() if one is not None} if type(value) is dict else value


class Strict(BaseModel):
    """No unknown fields, and no text where a number is asked for; null is as if nothing were said."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=describe)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, fields: Any) -> Any:
        if type(fields) is not dict and not isinstance(fields, cls):
            raise ValueError("must be an object")
        return without_null(fields)


def check_object(value: Any) -> dict[str, Any]:
    """A value that is a JSON object, not nested too deep, of texts and numbers that are such.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not dict:
        raise ValueError("must be a JSON object" + (AS_JSON if isinstance(value, bytes) else ""))
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in _inside(each)]
    if level:
        raise ValueError(TOO_DEEP)
    return value


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    """Objects and lists that stand in one.

    Raises:
        ValueError: a text beside them cannot be written, or a number is none. Python's reader takes both.
    """
    found = []
    for name, one in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(one, dict | list):
            found.append(one)
        elif isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"{name!a:.80} must be a finite number")
        if not (_is_whole(name) and _is_whole(one)):
            raise ValueError(f"{name!a:.80} holds half of a surrogate pair, which is no character")
    return found


def _is_whole(value: Any) -> bool:
    """Whether it is no text, or one that can be encoded."""
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
