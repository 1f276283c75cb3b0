"""What a chat's answer may be: calls of tools, or JSON of a schema; as OpenAI's requests say it. Knows no model."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from runtime.server.request.strict import TOO_DEEP, Strict, check_object

# What OpenAI takes.
NAME = r"^[A-Za-z0-9_-]{1,64}$"


class Function(Strict):
    """A function that the model may call.

    Attributes:
        parameters: a JSON schema of its arguments.
        strict: taken, and says nothing here: bound calls (`tool_choice`) always keep to the schema, others never must.
    """

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedFunction(Strict):
    """Which function is to be called."""

    name: str


class NamedTool(Strict):
    """The call of one function is asked for."""

    type: Literal["function"]
    function: NamedFunction


class Called(Strict):
    """The function that the assistant called.

    Attributes:
        arguments: a JSON object, as text.
    """

    name: str
    arguments: Annotated[dict[str, Any], WithJsonSchema({"type": ["string", "object"]})]

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, arguments: Any) -> Any:
        try:
            found = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        except ValueError:
            found = None
        except RecursionError:
            raise ValueError(TOO_DEEP) from None
        if not isinstance(found, dict):
            raise ValueError("must be a JSON object, as text")
        return check_object(found)


class Call(Strict):
    """A call that the assistant made, as it is sent back."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Called

    @model_validator(mode="before")
    @classmethod
    def _without_place(cls, fields: Any) -> Any:
        """Clients that collect a stream send its `index` back."""
        return {key: value for key, value in fields.items() if key != "index"} if type(fields) is dict else fields


class NamedSchema(Strict):
    """A JSON schema, with what OpenAI has around it; `strict` or not, answers keep to it."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer's text is to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema needs a json_schema, and no other type has one")
        return self

    @property
    def binding(self) -> dict[str, Any] | None:
        """The schema that binds the answer; None where nothing does."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None
