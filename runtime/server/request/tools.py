"""What a chat's answer may be: calls of tools, or JSON of a schema; as OpenAI's requests say it. Knows no model."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from runtime.server.request.strict import TOO_DEEP, Strict, check_object

# What OpenAI takes.
NAME = r"^[A-Za-z0-9_-]{1,64}$"
# Of caching, and what clients hold of a call besides: it says nothing to a template.
BESIDE = ("cache_control",)
BESIDE_CALL = ("index", "parsed_arguments", "provider_specific_fields")

# What the document says of a choice.
_FUNCTION = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
_NAMED = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    "required": ["type", "function"],
}
_ALLOWED = {
    "type": "object",
    "properties": {
        "mode": {"enum": ["auto", "required"]},
        "tools": {"type": "array", "items": _NAMED, "minItems": 1},
    },
    "required": ["mode", "tools"],
}
_SOME = {
    "type": "object",
    "properties": {"type": {"const": "allowed_tools"}, "allowed_tools": _ALLOWED},
    "required": ["type", "allowed_tools"],
}
CHOICE_SCHEMA = {"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED, _SOME]}


def without(fields: Any, names: Sequence[str]) -> Any:
    """An object without these fields; any other value as it is."""
    return {key: value for key, value in fields.items() if key not in names} if type(fields) is dict else fields


def name_of(value: Any) -> str | None:
    """The name of a function that is told as tools are; None where there is none."""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


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

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, fields: Any) -> Any:
        return without(fields, BESIDE)


class Tool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, fields: Any) -> Any:
        kind = fields.get("type") if type(fields) is dict else "function"
        if isinstance(kind, str) and kind != "function":
            raise ValueError(f"a tool of type {kind:.40} is not supported by this server: send tools of type function")
        if type(fields) is dict and fields.get("defer_loading") not in (None, False):
            raise ValueError("defer_loading is not supported by this server: leave it out")
        return without(fields, (*BESIDE, "defer_loading"))

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


class AllowedTools(Strict):
    """Some of the functions may be called, or one of them must.

    Attributes:
        names: of those.
    """

    mode: Literal["auto", "required"]
    names: set[str]

    @classmethod
    def of(cls, asked: Any) -> "AllowedTools":
        """As OpenAI has it: a mode, and tools by their names.

        Raises:
            ValueError: it is of another form.
        """
        tools = asked.get("tools") if isinstance(asked, dict) else None
        names = [name_of(tool) for tool in tools] if isinstance(tools, list) else []
        if not names or None in names or asked.get("mode") not in ("auto", "required"):
            raise ValueError("allowed_tools must give a mode, auto or required, and tools, functions by their names")
        return cls(mode=asked["mode"], names={str(name) for name in names})


class Called(Strict):
    """The function that the assistant called.

    Attributes:
        arguments: a JSON object, as text.
    """

    name: str
    arguments: Annotated[dict[str, Any], WithJsonSchema({"type": ["string", "object"]})]

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, fields: Any) -> Any:
        return without(fields, BESIDE_CALL)

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
    def _bare(cls, fields: Any) -> Any:
        return without(fields, BESIDE_CALL)


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
