"""`Strict`: what the parts of every body have in common."""

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


class Strict(BaseModel):
    """No unknown fields, and no text where a number is asked for; null is as if nothing were said."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=describe)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, fields: Any) -> Any:
        return {key: value for key, value in fields.items() if value is not None} if type(fields) is dict else fields


def check_object(value: Any) -> dict[str, Any]:
    """A value that is a JSON object, and not nested too deep.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not dict:
        raise ValueError("must be a JSON object" + (AS_JSON if isinstance(value, bytes) else ""))
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in level if isinstance(each, dict | list)]
    if level:
        raise ValueError(TOO_DEEP)
    return value
