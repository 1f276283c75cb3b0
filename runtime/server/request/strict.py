"""`Strict`: what the parts of every body have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """No unknown fields, and no text where a number is asked for; null is as if nothing were said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, fields: Any) -> Any:
        return {key: value for key, value in fields.items() if value is not None} if type(fields) is dict else fields
